"""The neuron's step in Triton, for CUDA: a pass that writes spikes, membrane potential and bits, one for its gradient.

It runs at every size, on inputs and membrane potentials of 32 or 16 bits, fires as the plain step does, and counts the
spikes. A λ that is learned stays on the device, and its gradient is a part of the second pass. Nothing waits for the
device, so that a graph can hold it.
"""

import functools
import warnings
from typing import Any

import torch
from torch import Tensor

from sltt.kernels.neuron.equations import NeuronStep
from sltt.kernels.neuron.native_step import SURROGATES, fires_as_usual, surrogate_index
from sltt.kernels.options import compiler_problem, options
from sltt.surrogates import Triangle

WARPS = 4
REPLAYED = 8  # time steps at most, each of which takes a register an element, or code


class TritonStep:
    """A step in Triton."""

    def __init__(self, step: NeuronStep):
        from sltt.kernels.neuron import triton_kernels  # imports Triton

        above, index = surrogate_index(step.surrogate, SURROGATES)
        self.differentiates = index is not None
        number, a, b = index or (0, 1.0, 1.0)
        soft, decay = step.v_reset is None, 0.0 if step.decay is None else step.decay
        self._kernels = triton_kernels
        named = {"decay": decay, "gain": 1 - decay, "threshold": step.v_threshold, "rest": step.v_reset or 0}
        self._constants = {name: float(value) for name, value in named.items()}  # a whole number is compiled anew
        self._shared = {"SOFT": soft, "SCALES": step.decay_input, "ABOVE": above}
        self._forward = {**self._shared, "RESTS": bool(step.v_reset)}
        derivative = {"a": float(a), "b": float(b), "SURROGATE": number, "DETACHED": step.detach_reset}
        self._backward = {**self._shared, **derivative}
        again = {"threshold_again": self._constants["threshold"], "rest_again": self._constants["rest"]}
        self._replayed = {**self._forward, **derivative, **again}

    def replays(self, steps: int) -> bool:
        """Return whether the gradient of so many steps runs them again from x and the first v."""
        return self.differentiates and 1 < steps <= REPLAYED

    def forward(
        self, s: Tensor, v_out: Tensor, u_out: Any, v: Tensor, x: Tensor, bits: Any, decay: Any, factors: Any = None
    ) -> Tensor:
        """Write spikes and membrane potentials of the time steps in x, and what else is given: u, and the spikes' bits.

        Returns parts of the number of spikes, one of each program. `v_out` is of all time steps, or of the last one.
        `decay` is a number, or λ and V_th of each channel, [2, C]. With `factors`, x is the input of a BatchNorm.
        """
        n = v.numel()
        steps = x.numel() // max(1, n)
        tiles = Tiles(v, by_channel(decay, factors), block_of(x))
        counts = s.new_empty(tiles.programs, dtype=torch.int32)
        self._launch(
            self._kernels.steps_forward, tiles, s, v_out, u_out, bits, counts, v, x, decay, factors, n, steps=steps,
            **self._forward, BY_CHANNEL=by_channel(decay), EVERY=v_out.numel() > n, num_warps=WARPS,
        )  # fmt: skip
        return counts

    def gradient(
        self, out: Tensor, out_v: Tensor | None, grad_s: Tensor | None, grad_v: Tensor | None, kept: Tensor | None,
        s: Tensor | None, v: Tensor | None, x: Tensor | None, decay: Tensor | None,
        learns: bool, steps: int, cut: bool, factors: Tensor | None,
    ) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
        """Write ∂L/∂x of all time steps, and ∂L/∂v before the first if wanted; give that of a learned `decay`.

        `kept` and s, the spikes or their bits, are of all time steps; without them the steps are replayed. v is the
        potential before the first. With `cut`, no gradient flows from one time step to the step before. With `factors`,
        x is the input of a BatchNorm: write ∂L/∂y of its output for ∂L/∂x; give the parts of its sums too.
        """
        n = out.numel() // steps
        first = out if steps == 1 else out[: len(out) // steps]
        # what is learned takes registers besides: then a thread replays four neurons, unless it reads x twice
        four = learns and kept is None and not self._shared["SCALES"]
        block = 128 * WARPS if four else block_of(out)
        if factors is not None and cut and kept is None and not learns:  # no u is kept: fewer sums, of more neurons
            block *= 2
        tiles = Tiles(first, by_channel(decay, factors), block)
        shape = tiles.parts if by_channel(decay) else (tiles.programs,)
        of_decay = out.new_empty(shape, dtype=torch.float32) if learns else None
        of_norm = None if factors is None else out.new_empty(steps, *tiles.parts, dtype=torch.float32)
        written, read = (out, out_v, of_decay, of_norm), (grad_s, grad_v)
        constants = {"parts": tiles.parts[0], "BY_CHANNEL": by_channel(decay), "CUT": cut, "num_warps": WARPS}
        if kept is None:
            self._launch(
                self._kernels.steps_replayed, tiles, *written, *read, v, x, decay, factors, n,
                **self._replayed, **constants, T=steps,
            )  # fmt: skip
        else:
            s = s if self._shared["SOFT"] else None
            self._launch(
                self._kernels.steps_backward, tiles, *written, *read, kept, s, v, x, decay, factors, n,
                **self._backward, **constants, steps=steps, FLOWS=grad_v is not None or (steps > 1 and not cut),
            )  # fmt: skip
        return None if of_decay is None else of_decay.sum(0), of_norm

    def _launch(self, kernel: Any, tiles: "Tiles", like: Tensor, *tensors: Any, **constants: Any) -> None:
        """Run a kernel, whose first tensor is `like`."""
        with torch.cuda.device_of(like):
            arguments = self._constants | constants | tiles.arguments
            kernel[(tiles.programs,)](like, *tensors, **arguments, enable_fp_fusion=False)


class Tiles:
    """The division of a time step's neurons [B, C, ...] among programs, a block for each.

    x has their shape and memory format: contiguous or with the channels last, if programs tell channels apart.
    """

    def __init__(self, x: Tensor, channels: bool, block: int):
        n = x.numel()
        width, count, tile, columns = n, 1, 0, False
        self.programs = -(-n // block)  # their number
        self.parts: tuple[int, ...] = (self.programs,)  # the shape of their sums, to be added up along the first axis
        if channels:
            count, inner = x.shape[1], x[:1, :1].numel()
            columns = inner <= 1 or not x.is_contiguous()
            width = count if columns else inner
            divides = width & -width  # the largest power of two that does
            tile = min(block, max(8, divides if divides >= 16 else 1 << (width - 1).bit_length()))
            tile = min(32, tile) if columns else tile
            rows, across = n // max(1, width), -(-width // tile)
            self.programs = -(-rows // (block // tile)) * across
            self.parts = (self.programs // max(1, across) if columns else len(x) * across, 2, count)
        self.arguments = {"width": width, "channels": count, "COLUMNS": columns, "TILE": tile, "BLOCK": block}
        self.whole_bytes = width % 8 == 0


def by_channel(decay: Tensor | None, factors: Tensor | None = None) -> bool:
    """Return whether there are values for each channel: `decay` of λ and V_th, [2, C], or a BatchNorm's `factors`."""
    return factors is not None or (decay is not None and decay.ndim > 1)


def block_of(x: Tensor) -> int:
    """Return the neurons of a program: 128 bits of x for each thread."""
    return 32 * WARPS * 16 // x.element_size()


def triton_step(
    step: NeuronStep, like: Tensor, x_dtype: torch.dtype, dtype: torch.dtype, decay: Tensor | None
) -> TritonStep | None:
    """Return the step in Triton; None where it cannot run. The arguments are those of `native_step`.

    `decay` may also be λ and V_th of each channel, [2, C].
    """
    if not like.is_cuda or not {dtype, x_dtype} <= {torch.float32, torch.bfloat16, torch.float16}:
        return None
    if decay is not None and (decay.dtype != dtype or decay.device != like.device):
        return None
    usual = fires_as_usual(step.surrogate) and step.subtract is None and step.most == 1
    if not usual or options().compile == "off" or problem(like.device):
        return None
    return _constant_step(step)


_constant_step = functools.lru_cache(maxsize=1024)(TritonStep)


@functools.cache
def problem(device: torch.device) -> str | None:
    """Return why no step runs in Triton on a device, in one line; None if it does. The first call runs one."""
    if reason := compiler_problem(device):
        return reason
    x = torch.zeros(1, device=device, dtype=torch.float32)
    try:
        TritonStep(NeuronStep(0.5, 1.0, None, False, False, Triangle())).forward(x, x, None, x, x, None, None)
    except Exception as error:  # no C compiler, no headers of Python, a GPU that is too old: the list is Triton's
        reason = f"Triton does not run: {error}"
        warnings.warn(f"neurons run slower, since {reason}", stacklevel=3)
    return reason
