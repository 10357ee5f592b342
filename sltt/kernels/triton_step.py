"""The neuron's step in Triton, for CUDA: a pass that writes spikes, membrane potential and bits, one for its gradient.

It runs at every size, on a float32 membrane potential, and fires as the plain step does. A λ that is learned stays on
the device, and its gradient is a part of the second pass. Nothing waits for the device, so that a graph can hold it.
"""

import functools
import math
import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sltt.kernels.native_step import SURROGATES, fires_as_usual, unwrap
from sltt.kernels.options import compiler_problem, options
from sltt.surrogates import Exponential, Gaussian, Sigmoid

if TYPE_CHECKING:
    from sltt.kernels.step import NeuronStep

# the number of a surrogate in triton_kernels.py, and its constants
_SURROGATES = SURROGATES | {
    Sigmoid: lambda s: (4, s.alpha, 0.0),
    Exponential: lambda s: (5, s.alpha, s.scale * s.alpha / 2),
    Gaussian: lambda s: (6, s.sigma, s.scale / (s.sigma * math.sqrt(2 * math.pi))),
}
WARPS = 4
REPLAYED = 8  # time steps at most, each of which takes a register an element


class TritonStep:
    """Run a step in Triton.

    Args:
        step: the constants.
    """

    def __init__(self, step: "NeuronStep"):
        from sltt.kernels import triton_kernels  # imports Triton

        above, surrogate = unwrap(step.surrogate)
        found = _SURROGATES.get(type(surrogate))
        self.differentiates = found is not None
        number, a, b = found(surrogate) if found else (0, 1.0, 1.0)
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
        self,
        s: Tensor,
        v_out: Tensor,
        u_out: Tensor | None,
        v: Tensor,
        x: Tensor,
        bits: Tensor | None,
        decay: Tensor | None,
    ) -> None:
        """Write spikes and membrane potentials of the time steps in x, and what else is given: u, and the spikes' bits.

        `v_out` is of all time steps, or of the last one.
        """
        n = v.numel()
        steps = x.numel() // max(1, n)
        self._launch(
            self._kernels.steps_forward, n, s, v_out, u_out, bits, v, x, decay, n, steps,
            **self._forward, EVERY=v_out.numel() > n,
        )  # fmt: skip

    def gradient(
        self,
        out: Tensor,
        out_v: Tensor | None,
        grad_s: Tensor | None,
        grad_v: Tensor | None,
        kept: Tensor | None,
        s: Tensor | None,
        v: Tensor | None,
        x: Tensor | None,
        decay: Tensor | None,
        learns: bool,
        steps: int,
        cut: bool,
    ) -> Tensor | None:
        """Write ∂L/∂x of all time steps, and ∂L/∂v before the first if wanted; give ∂L/∂λ if the neuron learns it.

        `kept` and s, the spikes or their bits, are of all time steps; without them the steps are replayed. v is the
        potential before the first. With `cut`, no gradient flows from one time step to the step before.
        """
        n = out.numel() // steps
        parts = torch.empty(-(-n // block_of(out)), device=out.device, dtype=torch.float32) if learns else None
        written, given = (out, out_v, parts), (grad_s, grad_v)
        if kept is None:
            self._launch(
                self._kernels.steps_replayed, n, *written, *given, v, x, decay, n,
                **self._replayed, CUT=cut, T=steps,
            )  # fmt: skip
        else:
            s = s if self._shared["SOFT"] else None
            self._launch(
                self._kernels.steps_backward, n, *written, *given, kept, s, v, x, decay, n, steps,
                **self._backward, CUT=cut, FLOWS=grad_v is not None or (steps > 1 and not cut),
            )  # fmt: skip
        return None if parts is None else parts.sum()

    def _launch(self, kernel: Any, n: int, like: Tensor, *tensors: Any, **constants: Any) -> None:
        """Run a kernel on n neurons; `like` is its first tensor, of x's type."""
        block = block_of(like)
        with torch.cuda.device_of(like):
            kernel[(-(-n // block),)](
                like, *tensors, **self._constants, **constants, BLOCK=block, num_warps=WARPS, enable_fp_fusion=False
            )


def block_of(x: Tensor) -> int:
    """Return the neurons of a program: 128 bits of x for each thread."""
    return 32 * WARPS * 16 // x.element_size()


def triton_step(
    step: "NeuronStep", like: Tensor, x_dtype: torch.dtype, dtype: torch.dtype, decay: Tensor | None
) -> TritonStep | None:
    """Return the step in Triton; None where it cannot run.

    Args:
        step: the constants.
        like: a tensor on the neurons' device.
        x_dtype: of the current.
        dtype: of the membrane potential.
        decay: λ where it is a tensor.
    """
    if not like.is_cuda or dtype != torch.float32 or x_dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return None
    if decay is not None and (decay.dtype != dtype or decay.device != like.device):
        return None
    if not fires_as_usual(step.surrogate) or options().compile == "off" or problem(like.device):
        return None
    if step.triton is None:
        object.__setattr__(step, "triton", TritonStep(step))  # of a value, which has one
    return step.triton


@functools.cache
def problem(device: torch.device) -> str | None:
    """Return why no step runs in Triton on a device, in one line; None if it does. The first call runs one."""
    if reason := compiler_problem(device):
        return reason
    from sltt.kernels.step import NeuronStep

    x = torch.zeros(1, device=device, dtype=torch.float32)
    try:
        TritonStep(NeuronStep(0.5, 1.0, None, False, False, Sigmoid())).forward(x, x, None, x, x, None, None)
    except Exception as error:  # no C compiler, no headers of Python, a GPU that is too old: the list is Triton's
        reason = f"Triton does not run: {error}"
        warnings.warn(f"neurons run slower, since {reason}", stacklevel=3)
    return reason
