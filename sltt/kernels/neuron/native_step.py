"""The neuron's step in C++: one pass that writes spikes, membrane potential and bits, and one for its gradient.

It runs where a compiled step would, on a CPU and a float32 membrane potential, and gives the bits of the plain step.
Only the derivative of a surrogate with an exponential differs in the last ones. A BatchNorm in front of the neuron is a
part of both passes. All time steps under a steady current are one pass too.
"""

import ctypes
import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sltt.kernels.native import library_for
from sltt.kernels.neuron.equations import NeuronStep
from sltt.kernels.options import dense
from sltt.surrogates import Above, ArcTan, Exponential, FastSigmoid, Gaussian, Rectangle, Sigmoid, Surrogate, Triangle

Known = dict[type[Surrogate], Callable[[Any], tuple[int, float, float]]]
# the number of a surrogate in spikes_neuron.cpp and triton_kernels.py, and its constants
SURROGATES: Known = {Triangle: lambda s: (0, s.gamma, s.gamma), Rectangle: lambda s: (1, s.gamma / 2, s.gamma)}
SURROGATES |= {ArcTan: lambda s: (2, math.pi * s.alpha / 2, s.alpha / 2)}
SURROGATES |= {FastSigmoid: lambda s: (3, s.alpha, s.scale * s.alpha / 2), Sigmoid: lambda s: (4, s.alpha, 0.0)}
SURROGATES |= {Exponential: lambda s: (5, s.alpha, s.scale * s.alpha / 2)}
SURROGATES |= {Gaussian: lambda s: (6, s.sigma, s.scale / (s.sigma * math.sqrt(2 * math.pi)))}


class _Constants(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_float) for name in ("decay", "gain", "threshold", "rest", "amount", "most")),
        *((name, ctypes.c_int32) for name in ("soft", "detached", "above", "surrogate")),
        *((name, ctypes.c_float) for name in ("a", "b", "inverse")),
    )


class NativeStep:
    """A step in native code."""

    def __init__(self, library: ctypes.CDLL, step: NeuronStep, decay: float):
        above, index = surrogate_index(step.surrogate, SURROGATES)
        self.differentiates = index is not None
        number, a, b = index or (0, 1.0, 1.0)
        inverse = 1 / a if a > 0 and math.frexp(a)[0] == 0.5 else 0.0
        gain = 1 - decay if step.decay_input else 1.0
        soft = step.v_reset is None
        self.library = library
        self.constants = ctypes.byref(
            _Constants(
                decay, gain, step.v_threshold, step.v_reset or 0.0, step.amount, step.most, soft, step.detach_reset,
                above, number, a, b, inverse,
            )
        )  # fmt: skip

    def forward(
        self, s: Tensor, v_out: Tensor, u_out: Tensor | None, v: Tensor, x: Tensor, bits: Tensor | None, factors: Any
    ) -> None:
        """Write spikes and membrane potentials of the time steps in x, and what else is given: u, and the spikes' bits.

        `v_out` is of all time steps, or of the last one. With `factors`, x is the input of a BatchNorm.
        """
        n, norm, channels = v.numel(), None, 0
        if factors is not None:
            norm, channels = factors.data_ptr(), factors.shape[-1]
        self.library.sltt_neuron(
            self.constants, norm, channels, x.dtype == torch.bfloat16, x.data_ptr(), v.data_ptr(), s.data_ptr(),
            v_out.data_ptr(), n if v_out.numel() > n else 0, None if u_out is None else u_out.data_ptr(),
            None if bits is None else bits.data_ptr(), n, x.numel() // max(1, n), torch.get_num_threads(),
        )  # fmt: skip

    def gradient(
        self, out: Tensor, out_v: Tensor | None, grad_s: Tensor | None, grad_v: Tensor | None, kept: Tensor, s: Tensor,
        x_dtype: torch.dtype, factors: Tensor | None, of_batch: bool, x: Tensor, steps: int, cut: bool,
    ) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
        """Write ∂L/∂u of all time steps, and ∂L/∂v before the first if wanted; s are the spikes or their bits.

        With `cut`, no gradient flows from one time step to the step before. With `factors`, x is the input of a
        BatchNorm, whose statistics are `of_batch` or not: write ∂L/∂x for ∂L/∂u; give ∂L/∂weight and ∂L/∂bias.
        """
        spikes, bits = (None, s) if s.dtype == torch.uint8 else (s, None)
        channels = 0 if factors is None else factors.shape[-1]
        affine = None if factors is None else factors.new_empty(2, channels)
        tensors = factors, grad_s, grad_v, kept, spikes, bits, x, out, out_v, affine
        norm, *pointers = [None if tensor is None else tensor.data_ptr() for tensor in tensors]
        self.library.sltt_neuron_gradient(
            self.constants, norm, channels, of_batch, x_dtype == torch.bfloat16, out.dtype == torch.bfloat16, *pointers,
            out.numel() // steps, steps, cut, torch.get_num_threads(),
        )  # fmt: skip
        return (None, None) if affine is None else (affine[0], affine[1])


def native_step(
    step: NeuronStep, like: Tensor, x_dtype: torch.dtype, dtype: torch.dtype, decay: Any, gradient: bool = False
) -> NativeStep | None:
    """Return the step in native code; None where it cannot run, or cannot give a `gradient` that is asked for.

    `like` has the shape and device of the neurons, `dtype` is of the membrane potential.
    """
    if not like.is_cpu or dtype != torch.float32 or x_dtype not in (torch.float32, torch.bfloat16):
        return None
    if not fires_as_usual(step.surrogate) or (decay is not None and (decay.ndim or decay.dtype != torch.float32)):
        return None
    if (library := library_for(like.numel())) is None:
        return None
    if decay is None:
        assert step.decay is not None
        native = _constant_step(library, step, step.decay)
    else:
        native = NativeStep(library, step, decay.item())
    return None if gradient and not native.differentiates else native


def steady_means(
    step: NeuronStep, x: Tensor, steps: int, dtype: torch.dtype, start: float, decay: Tensor | None
) -> tuple[Tensor, ...] | None:
    """Return means over T time steps under the current x, from the potential `start`: of s, of ∂s/∂x in x's type.

    Where λ is a tensor, of ∂s/∂λ in float32 too. None where no native code runs.
    """
    if (native := native_step(step, x, x.dtype, dtype, decay, gradient=True)) is None:
        return None
    x = x if dense(x) else x.contiguous()
    by_decay = None if decay is None else torch.empty_like(x, dtype=dtype)
    means = torch.empty_like(x), torch.empty_like(x), by_decay
    native.library.sltt_steady(
        native.constants, x.dtype == torch.bfloat16, x, start, steps, *means, x.numel(), torch.get_num_threads()
    )
    return tuple(mean for mean in means if mean is not None)


_constant_step = functools.lru_cache(maxsize=1024)(NativeStep)


def fires_as_usual(surrogate: Surrogate) -> bool:
    """Return whether a neuron fires at its threshold, or above it."""
    return type(surrogate).fires in (Surrogate.fires, Above.fires)


def surrogate_index(surrogate: Surrogate, known: Known) -> tuple[bool, tuple[int, float, float] | None]:
    """Return whether a neuron fires above its threshold only, and the number and constants of a `known` derivative."""
    above = type(surrogate).fires is Above.fires
    while type(surrogate) is Above:
        surrogate = surrogate.surrogate
    found = known.get(type(surrogate))
    return above, found and found(surrogate)
