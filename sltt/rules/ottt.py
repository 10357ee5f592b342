"""Online training through time: the weights' gradient from traces of what came before, the inputs' as in SLTT."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sltt.checks import flag, number
from sltt.neurons import Neuron
from sltt.rules.base import Batch, Output, Rule
from sltt.sequence.replace import replaced
from sltt.sequence.state import emits_spikes

_Conv = nn.Conv1d | nn.Conv2d | nn.Conv3d
_PLAIN = {kind.forward for kind in (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)}


class OTTT(Rule):
    """Online training through time: backward at every step, with a trace of the presynaptic spikes for the weights.

        ∇W^l = Σ_t e^l[t] â^{l−1}[t]^T,   â[t] = λ â[t−1] + s[t]

    e is that of SLTT. The trace stands for the paths through the membrane potential of the layer behind, which SLTT
    drops; paths through the reset and through more than one layer in time are dropped here too. Memory is that of one
    step and of a trace for each layer that reads spikes, and does not grow with T. Layers before the first neuron, and
    normalisation, have SLTT's gradient. With λ = 0, or T = 1, OTTT is SLTT.

    Args:
        decay: λ of the traces; None is that of the network's neurons, which must have one in common.
        online: update the weights after every time step, by the `update` that the rule is called with, instead of once
            a sequence.

    Raises:
        ValueError: decay outside [0, 1]; when called, neurons of several λ without `decay`, a weight layer that is used
            twice in a step or pads by other than zeros, or `online` without `update`.

    Source: Xiao et al., NeurIPS 2022 (arXiv 2210.04195).
    """

    def __init__(self, decay: float | None = None, online: bool = False):
        self.decay = None if decay is None else number("decay", decay, least=0, most=1)
        self.online = flag("online", online)

    def run(self, batch: Batch) -> Output:
        decay = _common_decay(batch.model) if self.decay is None else self.decay
        with _traced(batch.model, decay) as new_step:
            for t in range(batch.steps):
                new_step()
                batch.backward(batch.forward(range(t, t + 1)))
                batch.detach()
                if self.online and batch.update is not None:
                    batch.update()
        return batch.output()


def _common_decay(model: nn.Module) -> float:
    neurons = [m for m in model.modules() if emits_spikes(m)]
    decays = {round(float(m.decay()), 12) for m in neurons if isinstance(m, Neuron)}
    others = {type(m).__name__ for m in neurons if not isinstance(m, Neuron)}
    if len(decays) != 1 or others:
        known = f"λ = {sorted(decays)}" + "".join(f" and that of {name}" for name in sorted(others))
        raise ValueError(f"the network's neurons have {known}: choose one for the traces, OTTT(decay=…)")
    return decays.pop()


@contextmanager
def _traced(model: nn.Module, decay: float) -> Iterator[Callable[[], None]]:
    """Inside this block, weight layers behind a neuron keep a trace; gives what to call before every time step."""
    layers = [m for m in model.modules() if isinstance(m, nn.Linear | _Conv)]
    traces: dict[nn.Module, Tensor] = {}
    seen: set[nn.Module] = set()
    spiking = False

    def new_step() -> None:
        nonlocal spiking
        seen.clear()
        spiking = False

    def mark(module: nn.Module, inputs: Any, output: Any) -> None:
        nonlocal spiking
        spiking = True

    def traced(layer: Any) -> Any:
        plain = layer.forward

        def forward(input: Tensor) -> Tensor:
            if not spiking:
                return plain(input)
            if layer in seen:
                raise ValueError(f"{type(layer).__name__} is used twice in a time step, and has one trace only")
            seen.add(layer)
            with torch.no_grad():
                traces[layer] = decay * traces[layer] + input if layer in traces else input.detach().clone()
            return _Traced.apply(input, traces[layer], layer.weight, layer.bias, _function(layer))  # type: ignore[return-value]

        return forward

    for layer in layers:  # all are checked before the first is changed
        plain = type(layer).forward in _PLAIN and "forward" not in vars(layer)
        if not plain or getattr(layer, "padding_mode", "zeros") != "zeros":
            raise ValueError(f"OTTT knows PyTorch's own linear layers and convolutions padded by zeros, not {layer}")
    neurons = [m for m in model.modules() if emits_spikes(m)]
    for neuron in neurons:
        if any(p.ndim > 1 for p in neuron.parameters()):
            raise ValueError(f"OTTT has no traces for the weights inside of {type(neuron).__name__}; use SLTT")
    hooks = [m.register_forward_hook(mark) for m in neurons]
    try:
        with replaced({layer: traced(layer) for layer in layers}):
            yield new_step
    finally:
        for hook in hooks:
            hook.remove()


class _Linear:
    """y = x Wᵀ + b, and its backward from an input that may be another than that of the forward."""

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, weight, bias)

    def backward(self, grad: Tensor, x: Tensor, weight: Tensor, needs: list[bool]) -> Any:
        rows = grad.flatten(0, -2)
        return (
            grad @ weight if needs[0] else None,
            rows.T @ x.flatten(0, -2) if needs[1] else None,
            rows.sum(0) if needs[2] else None,
        )


class _Convolution:
    """A convolution, and its backward from an input that may be another than that of the forward."""

    def __init__(self, layer: Any):
        padding = layer.padding
        if isinstance(padding, str):
            raise ValueError(f"OTTT knows padding by numbers, not {layer}")
        self.settings = layer.stride, padding, layer.dilation, False, [0] * len(padding), layer.groups

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return torch.convolution(x, weight, bias, *self.settings)

    def backward(self, grad: Tensor, x: Tensor, weight: Tensor, needs: list[bool]) -> Any:
        return torch.ops.aten.convolution_backward(grad, x, weight, [weight.shape[0]], *self.settings, needs)


def _function(layer: Any) -> _Linear | _Convolution:
    return _Linear() if isinstance(layer, nn.Linear) else _Convolution(layer)


class _Traced(torch.autograd.Function):
    """A layer's output, with the trace in place of the input in the gradient of its weights."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: Tensor, trace: Tensor, weight: Tensor, bias: Tensor | None, function: Any
    ) -> Tensor:
        ctx.function, ctx.x_dtype, ctx.bias_dtype = function, x.dtype, None if bias is None else bias.dtype
        ctx.save_for_backward(trace, weight)
        return function.forward(x, weight, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        trace, weight = ctx.saved_tensors
        needs = [ctx.needs_input_grad[i] for i in (0, 2, 3)]
        # under autocast the forward was in another type than weights and traces
        of_x, of_weight, of_bias = ctx.function.backward(grad, trace.to(grad.dtype), weight.to(grad.dtype), needs)
        return (
            of_x.to(ctx.x_dtype) if needs[0] else None,
            None,
            of_weight.to(weight.dtype) if needs[1] else None,
            of_bias.to(ctx.bias_dtype) if needs[2] else None,
            None,
        )
