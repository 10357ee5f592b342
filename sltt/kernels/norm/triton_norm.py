"""BatchNorm in Triton, for CUDA: statistics for a neuron that normalises in its own pass, the output, the gradient.

Each runs all time steps of a call, with the statistics of each: two launches for the statistics, one for the output if
anybody looks at it, two for the gradient behind a neuron, whose pass adds up what this needs, and three behind others.
"""

from typing import Any

import torch
from torch import Tensor

from sltt.kernels.neuron.triton_step import WARPS, Tiles, block_of
from sltt.kernels.norm.norm import Pair

ROWS, CHANNELS = 128, 8  # of parts that a program adds up at once


def factors_of(
    x: Tensor, affine: Pair, running: Pair, training: bool, momentum: float, eps: float, steps: int
) -> Tensor:
    """Return scale, shift, mean and inverse deviation of each time step in x, [4, T, C].

    x, [T·B, C, ...], is contiguous, or has the channels last. In training it is normalised by its own statistics, and
    the `running` mean and variance are updated; else these are used.
    """
    first, channels = x[: len(x) // steps], x.shape[1]
    tiles = Tiles(first, True, 4 * block_of(x))
    factors, parts = x.new_empty(4, steps, channels, dtype=torch.float32), None
    number, shape = tiles.parts[0], (tiles.arguments["width"], channels, tiles.parts[0])
    if training:
        parts = x.new_empty(steps, *tiles.parts, dtype=torch.float32)
        launch("moments", (tiles.programs, steps), x, parts, first.numel(), parts=number, **tiles.arguments)
    launch(
        "write_factors", (-(-channels // CHANNELS),), factors, parts, x, *affine, *running, first.numel(), *shape,
        steps, float(first.numel() // channels), float(momentum), float(eps),
        COLUMNS=tiles.arguments["COLUMNS"], ROWS=ROWS, CHANNELS=CHANNELS,
    )  # fmt: skip
    return factors


def normalised(x: Tensor, factors: Tensor) -> Tensor:
    """Return the output of the BatchNorm."""
    first = x[: len(x) // factors.shape[1]]
    tiles, y = Tiles(first, True, block_of(x)), torch.empty_like(x)
    grid = (tiles.programs, factors.shape[1])
    launch("normalise", grid, x, y, factors, first.numel(), steps=factors.shape[1], **tiles.arguments)
    return y


def gradients(grad: Tensor, x: Tensor, factors: Tensor, training: bool, parts: Tensor | None = None) -> Any:
    """Return ∂L/∂x, ∂L/∂weight and ∂L/∂bias from ∂L/∂y, which is in x's memory format.

    Where the `parts` of Σ ∂L/∂y and Σ ∂L/∂y x̂, [T, parts, 2, C], are known, ∂L/∂x is written over ∂L/∂y.
    """
    steps, channels = factors.shape[1:]
    first, out = x[: len(x) // steps], torch.empty_like(x) if parts is None else grad
    tiles = Tiles(first, True, block_of(x))
    grid, n = (tiles.programs, steps), first.numel()
    if parts is None:
        parts = x.new_empty(steps, *tiles.parts, dtype=torch.float32)
        given = {"parts": tiles.parts[0], "steps": steps, **tiles.arguments}
        launch("gradient_parts", grid, x, grad, parts, factors, n, **given)
    sums, affine = factors.new_empty(steps, 2, channels), factors.new_empty(2, channels)
    launch(
        "gradient_sums", (-(-channels // CHANNELS),), sums, affine, parts, channels, parts.shape[1], steps,
        ROWS=ROWS, CHANNELS=CHANNELS,
    )  # fmt: skip
    share = channels / n if training else 0.0
    launch("gradient", grid, x, grad, out, factors, sums, n, steps=steps, share=share, **tiles.arguments)
    return out, affine[1], affine[0]


def launch(name: str, grid: tuple[int, ...], like: Tensor, *arguments: Any, **constants: Any) -> None:
    """Run a kernel."""
    from sltt.kernels.norm import triton_norm_kernels  # imports Triton

    with torch.cuda.device_of(like):
        kernel = getattr(triton_norm_kernels, name)[grid]
        kernel(like, *arguments, **constants, num_warps=WARPS, enable_fp_fusion=False)
