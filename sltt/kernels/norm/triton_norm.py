"""BatchNorm in Triton, for CUDA: statistics for a neuron that normalises in its own pass, the output, the gradient.

Each runs all time steps of a call, with the statistics of each: three launches for the statistics, one for the output
if anybody looks at it, three for the gradient behind a neuron, whose pass adds up what this needs, and four behind
others. PyTorch adds up the parts of sums, over the whole device.
"""

from typing import Any

import torch
from torch import Tensor

from sltt.kernels.neuron.triton_step import WARPS, Tiles, block_of
from sltt.kernels.norm.norm import Pair

CHANNELS = 128  # of a program that writes factors


def factors_of(
    x: Tensor, affine: Pair, running: Pair, training: bool, momentum: float, eps: float, steps: int
) -> Tensor:
    """Return scale, shift, mean and inverse deviation of each time step in x, [4, T, C].

    x, [T·B, C, ...], is contiguous, or has the channels last. In training it is normalised by its own statistics, and
    the `running` mean and variance are updated; else these are used.
    """
    first, channels = x[: len(x) // steps], x.shape[1]
    tiles = Tiles(first, True, 4 * block_of(x))
    factors, sums = x.new_empty(4, steps, channels, dtype=torch.float32), None
    if training:
        parts = x.new_empty(steps, *tiles.parts, dtype=torch.float32)
        launch("moments", (tiles.programs, steps), x, parts, first.numel(), parts=tiles.parts[0], **tiles.arguments)
        sums = parts.sum(1)
    launch(
        "write_factors", (-(-channels // CHANNELS),), factors, sums, x, *affine, *running, first.numel(),
        tiles.arguments["width"], channels, steps, float(first.numel() // channels), float(momentum), float(eps),
        COLUMNS=tiles.arguments["COLUMNS"], CHANNELS=CHANNELS,
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
        arguments = {"parts": tiles.parts[0], "steps": steps, **tiles.arguments}
        launch("gradient_parts", grid, x, grad, parts, factors, n, **arguments)
    sums = parts.sum(1)
    of_bias, of_weight = sums[0] if steps == 1 else sums.sum(0)
    share = channels / n if training else 0.0
    launch("gradient", grid, x, grad, out, factors, sums, n, steps=steps, share=share, **tiles.arguments)
    return out, of_weight, of_bias


def launch(name: str, grid: tuple[int, ...], like: Tensor, *arguments: Any, **constants: Any) -> None:
    """Run a kernel."""
    from sltt.kernels.norm import triton_norm_kernels  # imports Triton

    with torch.cuda.device_of(like):
        kernel = getattr(triton_norm_kernels, name)[grid]
        kernel(like, *arguments, **constants, num_warps=WARPS, enable_fp_fusion=False)
