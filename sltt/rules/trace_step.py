"""The time steps of OTTT: weight layers have the gradient of their traces, biases of normalisations too."""

from functools import cached_property, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from sltt import kernels
from sltt._torch import has_own_operations
from sltt.neurons import Recurrent
from sltt.rules.credit import CreditStep
from sltt.rules.traces import Traces, node_of
from sltt.sequence.layout import Layer
from sltt.sequence.run import Run
from sltt.sequence.step import NEURON
from sltt.sequence.steps import in_backward

NORMALISATIONS = {F.batch_norm, F.layer_norm, F.group_norm, F.instance_norm}
WEIGHTED = {F.linear, F.conv1d, F.conv2d, F.conv3d}


class TraceStep(CreditStep):
    """Time steps in which weights have the gradient of their traces; `end` is to be called after each forward.

    The arguments are those of `OTTT`.
    """

    def __init__(self, decay: float | None, inputs: bool, credit: bool = True):
        super().__init__(credit)
        self.decay, self.inputs = decay, inputs
        self.operations: dict[Layer, _TracedForward] = {}

    @cached_property
    def traces(self) -> Traces:
        return Traces(self.run.layout, self.decay, self.inputs)

    def require_folds(self) -> None:
        if problems := self.traces.layers_without_fold(self.run.layout):
            more = f" and {len(problems) - 1} more" if len(problems) > 1 else ""
            raise ValueError(f"OTTT in a fold has no traces for {problems[0]}{more}; use fold=1")

    def weight(self, layer: Layer, *args: Any, **kwargs: Any) -> Any:
        ours, module = self._operations_of(layer), layer.module
        operation = kernels.operation_of(module) if layer.is_known else None
        if operation is None or len(args) != 1 or not self.run.follows or has_own_operations():
            return ours.forward(*args, **kwargs)
        return ours.weigh(operation.function, args[0], layer.role.weight(module), module.bias, *operation.settings)

    def norm(self, layer: Layer, *args: Any, **kwargs: Any) -> Any:
        norm = layer.module
        if not (self.inputs and self.run.follows and self.traces.learns(norm, norm.bias)):
            return super().norm(layer, *args, **kwargs)
        if not (layer.role.stepwise and layer.is_known and len(args) == 1):
            return self._operations_of(layer).forward(*args, **kwargs)
        if (trace := self.traces.read(norm, None)) is None:
            return super().norm(layer, *args)
        bias: Any = norm.bias
        y = kernels.plain_norm(norm, args[0], _scale_gradient(bias, trace.ones[-1]))
        self.traces.wrote(trace, y)
        return y

    def pair(self, norm: Layer, neuron: Layer, x: Tensor) -> Tensor | None:
        traces, trace = self.traces, None
        bias: Any = norm.module.bias
        traced = neuron.module in traces.decays and not traces.learns_decay(neuron.module)
        if not traced or not self.may_pair(norm, neuron):
            return None
        if self.inputs and self.run.follows and traces.learns(norm.module, bias):
            trace = traces.read(norm.module, None)
            bias = bias if trace is None else _scale_gradient(bias, trace.ones[-1])
        y = self.run_pair(norm, neuron, x, bias)
        if y is None:
            if trace is None:
                return None
            z = kernels.plain_norm(norm.module, x, bias)
            traces.wrote(trace, z)
            return neuron.module(z)
        traces.arrive(neuron.module, (x,), {})
        if trace is not None and not trace.decays:
            trace.decays.append(traces.decays[neuron.module])
        traces.leave(neuron.module, y)
        return y

    def _recurrent(self, layer: Layer, x: Tensor) -> Tensor | None:
        """Run a recurrent layer in one native call; return None where there is none."""
        run, traces, inner, neuron = self.run, self.traces, layer.module.layer, layer.module.neuron
        if layer.advance is None or neuron not in traces.decays or traces.learns_decay(neuron):
            return None
        weight, bias = inner.weight, inner.bias

        def trace(read: Tensor) -> tuple[Tensor, list[Any]]:
            """Return what stands for the spikes that the weights read, and for 1."""
            kept = traces.read(inner, read if weight.requires_grad else None, run.fold)
            ones = [1.0] * run.fold
            if kept is None:
                return read, ones
            if kept.first:
                kept.decays = [traces.decays[neuron]]
                return read, ones
            return read if kept.read is None else kept.read.now, kept.ones if traces.inputs else ones

        learns = run.follows and (weight.requires_grad or (bias is not None and bias.requires_grad))
        run.take_turn(layer, NEURON)
        before = layer.module.s
        y = layer.advance(x, run.fold, run.cut, run.weights, trace if learns else None)
        if y is not None:
            if learns and not torch.is_grad_enabled():
                first = len(y) // run.fold
                trace(torch.cat([torch.zeros_like(y[:first]) if before is None else before, y[:-first]]))
            traces.arrive(neuron, (x,), {})
            traces.leave(neuron, y)
        return y

    def _operations_of(self, layer: Layer) -> "_TracedForward":
        if layer not in self.operations:
            self.operations[layer] = _TracedForward(layer, self.traces, self.run)
        return self.operations[layer]

    def neuron(self, layer: Layer, *args: Any, **kwargs: Any) -> Any:
        traces = self.traces
        if layer.module not in traces.decays:  # a neuron made of neurons
            return super().neuron(layer, *args, **kwargs)
        args, kwargs = traces.arrive(layer.module, args, kwargs)
        output = super().neuron(layer, *args, **kwargs)
        traces.leave(layer.module, output)
        return output

    def delay(self, layer: Layer, x: Tensor) -> Tensor:
        y, traces = super().delay(layer, x), self.traces
        traces.waits, traces.behind[node_of(y)] = self.waits, x.grad_fn
        return y

    def keeper(self, layer: Layer, *args: Any, **kwargs: Any) -> Any:
        if isinstance(layer.module, Recurrent) and len(args) == 1 and not in_backward():
            if (y := self._recurrent(layer, args[0])) is not None:
                return y
            if self.run.fold > 1:
                raise ValueError(f"OTTT in a fold has no traces for the weights in {layer}; use fold=1")
        output = super().keeper(layer, *args, **kwargs)
        self.traces.carry(layer.module, args, kwargs, output)
        return output


class _TracedForward(TorchFunctionMode):
    """Gives what a layer computes from its weights the gradient of their traces."""

    def __init__(self, layer: Layer, traces: Traces, run: Run):
        super().__init__()
        self.run = run
        self.layer, self.plain, self.weighs = layer.module, layer.plain, layer.role.kind == "weight"
        self.traces = traces

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the forward of the layer."""
        layer, before = self.layer, self.traces.uses[self.layer]
        with self:
            result = self.plain(*args, **kwargs)
        if self.weighs and self.traces.uses[layer] == before and self.run.follows and self.traces.wants(layer):
            raise ValueError(f"OTTT has no trace for the weights of {layer}: without F.linear or F.convNd, use SLTT")
        return result

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.run.follows:
            if func in WEIGHTED:
                return self.weigh(func, *args, **kwargs)
            if func in NORMALISATIONS and self.traces.inputs:
                return self._normalise(func, *args, **kwargs)
        elif func in WEIGHTED:
            self.traces.hide(self.layer)
        return func(*args, **kwargs)

    def weigh(
        self, func: Any, input: Tensor, weight: Tensor, bias: Tensor | None = None,
        stride: Any = 1, padding: Any = 0, dilation: Any = 1, groups: int = 1,
    ) -> Tensor:  # fmt: skip
        """Compute the layer's output from its weight, whose gradient is that of its trace."""
        x, settings = input, () if func is F.linear else (stride, padding, dilation, groups)
        learns = weight.requires_grad or not torch.is_grad_enabled()
        if not (self.traces.learns(self.layer, weight) or (bias is not None and bias.requires_grad)):
            return self._apply(func, settings, x, weight, bias)
        if padding == "same":
            sides: Any = self.layer._reversed_padding_repeated_twice  # from the last axis on
            padding = sides[::2][::-1]
            if sides[::2] != sides[1::2]:  # of an even kernel
                x, padding = F.pad(x, sides), 0
            settings = stride, padding, dilation, groups
        trace = self.traces.read(self.layer, x if learns else None, self.run.fold)
        if trace is None:
            return self._apply(func, settings, x, weight, bias)
        if trace.first:  # what is read is the trace, and may be spikes
            y = self._apply(func, settings, x, weight, bias)
        else:
            read = x if trace.read is None else trace.read.now  # without, the bias learns alone
            ones = trace.ones if self.traces.inputs else [1.0]
            y = _Traced.apply(x, read, weight, bias, ones, partial(self._apply, func, settings), settings)  # type: ignore[assignment]
        self.traces.wrote(trace, y)
        return y

    def _apply(self, func: Any, settings: tuple[Any, ...], x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if not self.run.fast or func is F.conv3d:
            return func(x, weight, bias, *settings)
        axes = {F.linear: 0, F.conv1d: 1}.get(func, 2)
        return kernels.run_layer(kernels.LayerFunction(func, axes, settings), x, weight, bias, self.run.weights)

    def _normalise(self, func: Any, *args: Any, bias: Tensor | None, **settings: Any) -> Tensor:
        trace = self.traces.read(self.layer, None) if self.traces.learns(self.layer, bias) else None
        if bias is None or trace is None:
            return func(*args, bias=bias, **settings)
        y: Tensor = func(*args, bias=_scale_gradient(bias, trace.ones[-1]), **settings)
        self.traces.wrote(trace, y)
        return y


class _Traced(torch.autograd.Function):
    """A layer's output, with traces in place of the input and of the constant 1 in the gradient of its weights."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, trace: Tensor, weight: Tensor, bias: Any, ones: Any, func: Any, settings: Any
    ) -> Any:  # type: ignore[override]
        ctx.settings, ctx.ones = settings, ones
        ctx.save_for_backward(trace, weight)
        y = func(x, weight, bias)  # which may be sparse
        return y.new_empty(0).set_(y) if y._is_view() else y  # views of a function may not be changed in place

    @staticmethod
    @kernels.differentiable_once
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        trace, weight = ctx.saved_tensors
        needs = [ctx.needs_input_grad[i] for i in (0, 2)]
        # under autocast the forward was in another type than traces
        of_x, of_weight = _gradients(grad, trace.to(grad.dtype), weight, ctx.settings, needs)
        of_bias = None
        if ctx.needs_input_grad[3]:  # its input 1 has the trace `ones` in each time step of grad [n·B, ...]
            others = [axis for axis in range(grad.ndim) if axis != (1 if ctx.settings else grad.ndim - 1)]
            parts = zip(grad.chunk(len(ctx.ones)), ctx.ones, strict=True)
            of_bias = sum(part.sum(others) * trace for part, trace in parts)
        return of_x, None, of_weight, of_bias, None, None, None


def _gradients(grad: Tensor, x: Tensor, weight: Tensor, settings: tuple[Any, ...], needs: list[bool]) -> Any:
    """Return the gradients of input and weight that are needed; `settings` are those of a convolution."""
    if not settings:
        of_x = grad @ weight.to(grad.dtype) if needs[0] else None
        return of_x, grad.flatten(0, -2).T @ x.flatten(0, -2) if needs[1] else None
    stride, padding, dilation, groups = settings
    axes = stride, 0 if padding == "valid" else padding, dilation
    dims = weight.ndim - 2
    stride, padding, dilation = ([a] * dims if isinstance(a, int) else list(a) for a in axes)
    return kernels.convolution_gradients(grad, x, weight, (stride, padding, dilation), groups, needs)


def _scale_gradient(x: Tensor, factor: float | Tensor) -> Tensor:
    """Return the same tensor, and its gradient times a factor."""
    same = x.view_as(x)
    if x.requires_grad:
        same.register_hook(lambda grad: grad * factor)
    return same
