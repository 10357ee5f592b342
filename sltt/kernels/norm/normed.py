"""BatchNorm in front of a neuron that normalises while it charges, so that no normalised tensor is written.

The statistics are computed in one pass over the BatchNorm's input. Forward, that saves a pass over memory that reads
and one that writes; backward, the neuron's pass also sums what BatchNorm's gradient needs. It pays for a large tensor
on a CPU, and for several time steps on CUDA.

    y = (x − μ) / √(σ² + ε) · w + b = scale · x + shift
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sltt._torch import transforms_active
from sltt.kernels import native
from sltt.kernels.neuron import triton_step
from sltt.kernels.norm import triton_norm
from sltt.kernels.norm.norm import batch_statistics
from sltt.kernels.options import options

# Fewer elements than this in one time step are normalised by themselves.
NORMED_FROM = 2**17


class Normed(NamedTuple):
    """The input of a BatchNorm, and how a neuron normalises it."""

    x: Tensor
    weight: Tensor | None
    bias: Tensor | None
    factors: Tensor  # scale, shift, mean and inverse deviation of each time step, [4, T, C]
    training: bool  # mean and deviation are those of the input


def prepare_norm(norm: Any, x: Tensor, bias: Tensor | None = None, steps: int = 1) -> Normed | None:
    """Compute the statistics of a BatchNorm for a neuron that normalises; return None where the norm runs by itself.

    `bias`, if given, stands for the norm's, whose values it has. x is of so many time steps, each with its statistics.
    """
    bias = norm.bias if bias is None else bias
    training = norm.training or norm.running_mean is None
    tracked = not norm.training or norm.track_running_stats
    running = (norm.running_mean, norm.running_var) if tracked else (None, None)
    dims = {nn.BatchNorm1d: (2, 3), nn.BatchNorm2d: (4,), nn.BatchNorm3d: (5,)}  # of others, PyTorch says so
    takes_it = any(isinstance(norm, kind) and x.ndim in takes for kind, takes in dims.items())
    if not takes_it or not _fits(x, (*running, norm.weight, norm.bias), training, steps):
        return None
    triton = in_triton(x)
    if triton and (norm.momentum is None or (norm.weight is None) != (norm.bias is None)):
        return None
    _, momenta = batch_statistics(norm, steps)
    if triton:
        arguments = (norm.weight, bias), running, training, momenta[0], norm.eps, steps
        factors = triton_norm.factors_of(x.detach(), *arguments)
    else:
        library, channels = native.library(), x.shape[1]
        assert library is not None
        factors = torch.empty(4, steps, channels, dtype=torch.float32, device="cpu")
        library.sltt_norm(
            x.dtype == torch.bfloat16, x, x.numel() // steps, steps, channels, *running, norm.weight, bias,
            training, torch.tensor(momenta, dtype=torch.float64), norm.eps, factors, torch.get_num_threads(),
        )  # fmt: skip
    return Normed(x, norm.weight, bias, factors, training)


def in_triton(x: Tensor) -> bool:
    """Return whether Triton normalises x."""
    return x.is_cuda and triton_step.problem(x.device) is None


def _fits(x: Any, others: Sequence[Any], training: bool, steps: int) -> bool:
    if type(x) is not Tensor or x.ndim < 2:
        return False
    mode, triton = options().compile, in_triton(x)
    large = x.is_cpu and (steps > 1 or x.numel() >= (2 if mode == "on" else NORMED_FROM))
    if mode == "off" or not (triton or large):
        return False
    if not x.movedim(1, -1).is_contiguous() and not (triton and x.is_contiguous()):
        return False
    if x.dtype not in (torch.float32, torch.bfloat16, *([torch.float16] if triton else [])):
        return False
    if x.is_inference() or x.is_neg() or transforms_active() or x.numel() == steps * x.shape[1]:  # one a channel
        return False
    if (others[0] is None) != (others[1] is None) or not (training or others[0] is not None):
        return False
    vectors = [vector for vector in others if vector is not None]  # kernels read or write a value for each channel
    plain = all(type(o) in (Tensor, nn.Parameter) and o.device == x.device and not o.is_inference() for o in vectors)
    plain &= all(o.dtype == torch.float32 and o.shape == x.shape[1:2] and o.is_contiguous() for o in vectors)
    return plain and (triton or native.library() is not None)
