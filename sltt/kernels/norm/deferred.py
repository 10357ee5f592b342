"""BatchNorm in front of a neuron: its output waits, and the neuron normalises while it charges.

A BatchNorm of a large tensor on a CPU, or of several time steps on CUDA, computes its statistics, in one pass, and
gives a `Deferred`: a tensor without memory. A neuron that takes it reads the BatchNorm's input, so that no normalised
tensor is written. Forward, that saves a pass over memory that reads and one that writes; backward, the neuron's pass
also sums what BatchNorm's gradient needs.

Whatever else uses a `Deferred` finds the normalised tensor, computed once, and with its gradient.

    y = (x − μ) / √(σ² + ε) · w + b = scale · x + shift
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version

from sltt._torch import _disabled_torch_function_impl, transforms_active, tree_map_only
from sltt.kernels import native
from sltt.kernels.derivatives import differentiable_once
from sltt.kernels.neuron import triton_step
from sltt.kernels.norm import triton_norm
from sltt.kernels.norm.norm import batch_statistics
from sltt.kernels.options import match_format, options
from sltt.kernels.spikes.saved import tag_made

# Fewer elements than this are normalised at once.
DEFER_FROM = 2**17


def _normalise(x: Tensor, factors: Tensor) -> Tensor:
    if factors.ndim == 3:
        return triton_norm.normalised(x, factors)
    scale, shift, *_ = factors
    none, one = torch.zeros_like(scale), torch.ones_like(scale)
    return torch.native_batch_norm(x, scale, shift, none, one, False, 0.0, 0.0)[0]


class Deferred(Tensor):
    """A tensor that is normalised when somebody looks at it.

    Attributes:
        factors: scale, shift, mean and inverse deviation [4, C]; in Triton those of each time step, [4, T, C].
        training: mean and deviation are those of the input.
        inputs: of the BatchNorm, in their graphs: x, weight and bias.
        version: of x.
        made: its node in the graph; a checkpoint around the BatchNorm puts another one in its place.
        waits: nobody has looked.
    """

    factors: Tensor
    training: bool
    inputs: tuple[Tensor, Tensor | None, Tensor | None]
    version: int
    made: Any
    waits = True
    _value: Tensor
    __torch_function__ = _disabled_torch_function_impl  # pyright: ignore[reportAssignmentType]

    @property
    def source(self) -> Tensor:
        """Return the input of the BatchNorm without a graph; raise RuntimeError where it has changed."""
        x, *_ = self.inputs
        if x._version != self.version:
            raise RuntimeError(
                f"the input {list(x.shape)} of a BatchNorm was changed in place before its output was used: use "
                'the output first, or train within sltt.kernels.using(compile="off")'
            )
        return x.detach()

    @property
    def value(self) -> Tensor:
        """The normalised tensor."""
        if self.waits:
            self._value, self.waits = _normalise(self.source, self.factors), False
        return self._value

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = tree_map_only(Deferred, lambda tensor: tensor.value, (args, kwargs or {}))
        return func(*args, **kwargs)

    # what reads memory without an operation

    def data_ptr(self) -> int:
        return self.value.data_ptr()

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.value.untyped_storage()

    def numpy(self, *, force: bool = False) -> Any:
        return self.value.numpy(force=force)

    def tolist(self) -> Any:
        return self.value.tolist()

    def __array__(self, *args: Any, **kwargs: Any) -> Any:
        return self.value.__array__(*args, **kwargs)


class _Defer(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, factors: Tensor, training: bool
    ) -> Tensor:
        ctx.training = training
        ctx.save_for_backward(x, weight, factors)
        return Tensor._make_wrapper_subclass(
            Deferred, x.shape, strides=x.stride(), dtype=x.dtype, device=x.device, layout=x.layout
        )

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, weight, factors = ctx.saved_tensors
        needs = ctx.needs_input_grad[:3]
        if factors.ndim == 3:
            grads = triton_norm.gradients(match_format(grad, x), x, factors, ctx.training)
        else:
            _, _, mean, invstd = factors
            grads = torch.ops.aten.native_batch_norm_backward(
                grad, x, weight, mean, invstd**-2, mean, invstd, ctx.training, 0.0, needs
            )
        return *(g if need else None for g, need in zip(grads, needs, strict=True)), None, None


class _Settle(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Deferred) -> Tensor:  # type: ignore[override]
        return x.value.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        return grad


def materialise(x: Tensor) -> Tensor:
    """Return a tensor with memory, to normalise again in a backward that needs it."""
    if not isinstance(x, Deferred):
        return x
    waits, y = x.waits, _Settle.apply(x)
    if waits:  # nobody can have changed it
        tag_made(y, x.source, partial(_normalise, factors=x.factors))  # type: ignore[arg-type]
    return y  # type: ignore[return-value]


def first_step(x: Tensor, steps: int) -> Tensor:
    """Return the first of the time steps in x, for its shape, type and memory format; a `Deferred` still waits."""
    x = x.inputs[0].detach() if isinstance(x, Deferred) else x
    return x if steps == 1 else x[: len(x) // steps]


def split_norm(x: Deferred, fits: bool) -> tuple[Tensor | None, bool, Tensor, Tensor | None, Tensor | None]:
    """Return how x is normalised, with the input, weight and bias of the BatchNorm; or no factors, and x settled.

    Args:
        x: the neuron's input.
        fits: the neuron can normalise.
    """
    if not (fits and x.waits and x.grad_fn is x.made):
        return None, False, materialise(x), None, None
    _ = x.source  # as it was
    return x.factors, x.training, *x.inputs


def deferred_norm(norm: Any, x: Tensor, bias: Tensor | None = None, steps: int = 1) -> Deferred | None:
    """Return the output of a BatchNorm, which waits; None where PyTorch computes it.

    `bias`, if given, stands for the norm's, whose values it has. x is of so many time steps, each with its statistics.
    """
    bias = norm.bias if bias is None else bias
    training = norm.training or norm.running_mean is None
    tracked = not norm.training or norm.track_running_stats
    running = (norm.running_mean, norm.running_var) if tracked else (None, None)
    if not _can_wait(x, (*running, norm.weight, norm.bias), training, steps):
        return None
    triton = in_triton(x)
    if triton and (norm.momentum is None or (norm.weight is None) != (norm.bias is None)):
        return None
    norm._check_input_dim(x)
    _, (momentum, *_) = batch_statistics(norm, steps)
    if triton:
        factors = triton_norm.factors_of(x.detach(), (norm.weight, bias), running, training, momentum, norm.eps, steps)
    else:
        library, channels = native.library(), x.shape[1]
        assert library is not None
        factors = torch.empty(4, channels, dtype=torch.float32, device="cpu")
        library.sltt_norm(
            x.dtype == torch.bfloat16, x, x.numel(), channels, *running, norm.weight, bias,
            training, momentum, norm.eps, factors, torch.get_num_threads(),
        )  # fmt: skip
    if training:
        increment_version([one for one in running if one is not None])  # they were changed in place
    y: Any = _Defer.apply(x, norm.weight, bias, factors, training)
    y.factors, y.training, y.inputs = factors, training, (x, norm.weight, bias)
    y.version, y.made = x._version, y.grad_fn
    return y


def in_triton(x: Tensor) -> bool:
    """Return whether Triton normalises x."""
    return x.is_cuda and triton_step.problem(x.device) is None


def _can_wait(x: Any, others: Sequence[Any], training: bool, steps: int) -> bool:
    if type(x) is not Tensor or x.ndim < 2:
        return False
    mode, triton = options().compile, in_triton(x)
    large = x.is_cpu and steps == 1 and x.numel() >= (2 if mode == "on" else DEFER_FROM)
    if mode == "off" or not (triton or large):
        return False
    if not x.movedim(1, -1).is_contiguous() and not (triton and x.is_contiguous()):
        return False
    if x.dtype not in (torch.float32, torch.bfloat16, *([torch.float16] if triton else [])):
        return False
    if x.is_inference() or x.is_neg() or x.numel() == steps * x.shape[1]:  # one value for each channel
        return False
    if transforms_active():
        return False
    if (others[0] is None) != (others[1] is None) or not (training or others[0] is not None):
        return False
    return all(o is None or _is_vector(o, x) for o in others) and (triton or native.library() is not None)


def _is_vector(vector: Any, x: Tensor) -> bool:
    """Return whether kernels can read and write a value for each channel of x."""
    known = type(vector) in (Tensor, nn.Parameter) and vector.device == x.device and not vector.is_inference()
    return known and vector.dtype == torch.float32 and vector.shape == x.shape[1:2] and vector.is_contiguous()
