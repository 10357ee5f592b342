"""Rate-based backpropagation: one pass over firing rates, recorded in T steps without a graph or made on the way."""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sltt._torch import _BatchNorm, _DropoutNd
from sltt.checks import flag
from sltt.dropout import Dropout
from sltt.kernels import NeuronStep, Sensitivity, Steady, batch_statistics, steady_steps
from sltt.losses import OfMean, is_per_step
from sltt.neurons import IntegrateAndFire
from sltt.rules.base import Batch, Output, Rule, step_loss
from sltt.sequence.replace import own_forward, replaced
from sltt.sequence.spikes import counters, observers, show
from sltt.sequence.state import Stateful, state_names


class RateBased(Rule):
    """Rate-based backpropagation: one backward pass per sequence, through mean firing rates instead of spikes.

        c = W r^{l−1},   r = 1/T Σ_t s[t]                               rate pass              (1)
        ∂r/∂c = 1/T Σ_t ∂s[t]/∂u[t] f[t]                                collected in T steps   (2)
        f[t] = 1 + λ ∂v[t−1]/∂u[t−1] f[t−1],   f[1] = 1                 through leak and reset (3)
        ∂v/∂u = 1 − V_th ∂s/∂u     soft reset;  1 with `detach_reset`                          (4)
        ∂v/∂u = 1 − s − (u − v_r) ∂s/∂u     hard reset;  1 − s with `detach_reset`             (5)

    The T steps run without a graph. Then the network runs once with a graph, on the mean input, with r in place of
    spikes. The gradient drops differences between time steps. Memory: the graph of one step, and about three tensors
    per layer of neurons.

    The loss is ℓ(ō, y) of the mean logits ō = 1/T Σ_t o[t], and `Output.loss` is its value. The gradient has the size
    of BPTT's; with T = 1 it is that of SLTT and BPTT.

    Args:
        steady: skip the T steps of the network. Each layer of neurons runs T steps under its mean current instead. A
            batch costs about what it costs with ReLU. `Output.logits` are those of the rates: train the last epochs
            with another rule.

    Raises:
        ValueError: when called, a module with a state other than LIF, IF and PLIF. Without `steady` also a neuron or
            BatchNorm that is not used exactly once per step, BatchNorm with a forward of its own (SyncBatchNorm), or
            a dropout module of PyTorch's, whose mask changes at every step.

    Source: Yu et al., NeurIPS 2024 (arXiv 2410.11488); (3) to (5) as in the authors' code
    (github.com/Tab-ct/rate-based-backpropagation, model/layer.py), where V_th = 1 and v_r = 0.
    """

    sequence_losses = (OfMean,)
    pads = False

    def __init__(self, steady: bool = False):
        self.steady = flag("steady", steady)

    def run(self, batch: Batch) -> Output:
        if is_per_step(batch.loss):
            raise ValueError("RateBased has mean logits only, and the loss takes targets for each time step: use SLTT")
        return self._run_steady(batch) if self.steady else self._run_recorded(batch)

    def _run_steady(self, batch: Batch) -> Output:
        with replaced({one.module: partial(one.steady, steps=batch.steps) for one in _neuron_layers(batch.model)}):
            logits = batch.rates()
        value = _loss(batch, logits)
        batch.backward(value)
        return Output(value.detach(), logits.detach().expand(batch.steps, *logits.shape))

    def _run_recorded(self, batch: Batch) -> Output:
        layers: list[_Layer] = [*_neuron_layers(batch.model), *_norm_layers(batch.model)]
        with replaced({layer.module: layer.step for layer in layers}):
            for t in range(batch.steps):
                batch.run(range(t, t + 1), graph=False)
                for layer in layers:
                    layer.check(t + 1)
            logits = torch.stack([batch.logits(t) for t in range(batch.steps)])
            buffers = [(buffer, buffer.clone()) for buffer in batch.model.buffers()]
            try:
                with replaced({layer.module: layer.rate for layer in layers}):
                    rates = batch.rates()
                value = _loss(batch, _with_value(logits.mean(0), rates))
                batch.backward(value)
            finally:
                with torch.no_grad():  # after the backward, which may have saved them
                    for buffer, before in buffers:
                        buffer.copy_(before)
        return Output(value.detach(), logits)


def _loss(batch: Batch, logits: Tensor) -> Tensor:
    """The loss of the mean logits [B, C]."""
    return step_loss(batch.loss, logits.unsqueeze(0) if batch.whole else logits, batch.target)


def _with_value(value: Tensor, x: Tensor) -> Tensor:
    """The numbers of `value`, with the gradient of x: x − x is 0 to the last bit."""
    return value + (x - x.detach()).to(value.dtype)


class _Layer:
    """What a layer gathers in the T steps for the rate pass."""

    def __init__(self, name: str, module: Any):
        self.name, self.module = name, module
        self.calls = 0

    def step(self, x: Tensor) -> Tensor:
        """The layer in one of the T steps."""
        raise NotImplementedError

    def rate(self, x: Tensor) -> Tensor:
        """The layer in the rate pass."""
        raise NotImplementedError

    def check(self, steps: int) -> None:
        """Raise ValueError unless the layer ran once in each of the steps so far, or never."""
        if self.calls not in (0, steps):
            raise ValueError(
                f"{self.name} ({type(self.module).__name__}) ran {self.calls} times in {steps} time steps, and "
                "RateBased keeps one rate for it: use a module for each place, in every step, or the rule SLTT"
            )


class _NeuronLayer(_Layer):
    def __init__(self, name: str, module: IntegrateAndFire):
        super().__init__(name, module)
        decay = module.decay()
        self.learnable = isinstance(decay, Tensor)
        self.constants = NeuronStep(decay=None if isinstance(decay, Tensor) else decay, **module.constants())
        self.spikes: Tensor | None = None
        self.by_input, self.by_decay = Sensitivity(self.constants), Sensitivity(self.constants)

    def steady(self, x: Tensor, steps: int) -> Tensor:
        """The layer in a rate pass without steps before: so many under x itself."""
        module, decay = self.module, self.module.decay()
        dtype, rate = module.state_type(x), decay.detach() if self.learnable else None
        # of a rate in 16 bits, a short sequence leaves the number of spikes to be told
        count = counters(module) if steps * torch.finfo(x.dtype).eps <= 0.5 else ()
        see = partial(show, module) if len(observers(module)) > len(count) else None
        with torch.no_grad():
            found = steady_steps(self.constants, x, steps, dtype, module.start, rate, see)
            for add in count if see is None else ():
                add((found.rate * steps).round_(), steps)
        return _Rate.apply(x, decay, found)  # type: ignore[return-value]

    def step(self, x: Tensor) -> Tensor:
        self.calls += 1
        neuron, constants = self.module, self.constants
        before, s = neuron.v, IntegrateAndFire.forward(neuron, x)
        after: Tensor = neuron.v
        before = torch.full_like(after, neuron.start) if before is None else before
        decay = neuron.decay()
        kept, current = after, x.to(after.dtype)
        if constants.v_reset is not None:
            kept = torch.empty_like(after).copy_(constants.charge(before, current, decay))
        tensor = decay if self.learnable else None
        self.by_input.add(kept, s, tensor)
        if self.learnable:
            moved = before - (constants.v_reset or 0.0) - (current if constants.decay_input else 0.0)
            self.by_decay.add(kept, s, tensor, torch.empty_like(after).copy_(moved))
        sums = torch.promote_types(after.dtype, torch.float32)
        self.spikes = s.to(sums, copy=True) if self.spikes is None else self.spikes.add_(s)
        return s

    def rate(self, x: Tensor) -> Tensor:
        if self.spikes is None:
            raise ValueError(f"{self.name} does not run in the time steps as it does on their mean input: use SLTT")
        self.module.reset()  # what the T steps left goes, layer by layer
        count, self.spikes = self.spikes, None
        by_decay = self.by_decay.take() if self.learnable else None
        n, by_input = self.calls, self.by_input.take()
        by_decay = None if by_decay is None else by_decay.div_(n)
        found = Steady(count.div_(n).to(x.dtype), by_input.div_(n).to(x.dtype), by_decay)
        return _Rate.apply(x, self.module.decay(), found)  # type: ignore[return-value]


class _Rate(torch.autograd.Function):
    """The rate, with the derivatives that were gathered."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: Tensor, decay: float | Tensor, found: Steady
    ) -> Tensor:
        ctx.save_for_backward(found.by_input, found.by_decay)
        ctx.decay_shape = decay.shape if isinstance(decay, Tensor) else None
        return found.rate

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        by_input, by_decay = ctx.saved_tensors
        of_decay = None if by_decay is None else (grad * by_decay).sum().reshape(ctx.decay_shape)
        return grad * by_input, of_decay, None


class _NormLayer(_Layer):
    """BatchNorm, whose rate pass normalises as the T steps did, by the means over time of their statistics.

    Time averages, so the deviation of the mean input is smaller, and would make the gradient too large.
    """

    mean: Tensor | float = 0.0
    inverse: Tensor | float = 0.0

    def step(self, x: Tensor) -> Tensor:
        """As `_BatchNorm.forward`, by the operator that gives the statistics too."""
        self.calls += 1
        norm = self.module
        norm._check_input_dim(x)
        if x.numel() == x.shape[1]:
            raise ValueError(
                f"BatchNorm needs more than one value for each channel, got {list(x.shape)}: use a larger batch"
            )
        running, (momentum,) = batch_statistics(norm, 1)
        y, mean, inverse = torch.native_batch_norm(
            x, norm.weight, norm.bias, *(running or (None, None)), True, momentum, norm.eps
        )
        self.mean, self.inverse = self.mean + mean, self.inverse + inverse
        return y

    def rate(self, x: Tensor) -> Tensor:
        norm, n = self.module, self.calls
        if not isinstance(self.inverse, Tensor):
            raise ValueError(f"{self.name} does not run in the time steps as it does on their mean input: use SLTT")
        var, mean = _statistics(x)
        mean = _with_value(self.mean / n, mean)
        scale = torch.rsqrt(_with_value((self.inverse / n) ** -2, var))
        scale = scale if norm.weight is None else scale * norm.weight
        shift = -mean * scale if norm.bias is None else norm.bias - mean * scale
        form = (-1, *[1] * (x.ndim - 2))
        return (x * scale.view(form) + shift.view(form)).to(x.dtype)


def _statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Variance and mean [C] of x [B, C, ...], at least in float32."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    return torch.var_mean(x, [0, *range(2, x.ndim)], correction=0)


def _neuron_layers(model: nn.Module) -> list[_NeuronLayer]:
    """The layers of neurons; raises ValueError naming a module with a state that the rate pass cannot run."""
    layers: list[_NeuronLayer] = []
    for name, module in model.named_modules():
        if isinstance(module, IntegrateAndFire) and module.is_plain() and not own_forward(module, IntegrateAndFire):
            layers.append(_NeuronLayer(name, module))
        elif _keeps_state(module):
            raise ValueError(
                f"RateBased knows the derivative of LIF, IF and PLIF, not of {name} "
                f"({type(module).__name__}), which keeps a state in a way of its own: use SLTT"
            )
    return layers


def _norm_layers(model: nn.Module) -> list[_NormLayer]:
    """BatchNorm on batch statistics; raises ValueError naming a module that changes over T steps in another way."""
    layers: list[_NormLayer] = []
    for name, module in model.named_modules():
        if isinstance(module, _BatchNorm) and (module.training or module.running_mean is None):
            if own_forward(module, _BatchNorm):
                raise ValueError(
                    f"RateBased knows PyTorch's plain BatchNorm, not {name} ({type(module).__name__}): use "
                    "that, or SLTT"
                )
            layers.append(_NormLayer(name, module))
        elif isinstance(module, _DropoutNd) and module.training and module.p > 0:
            raise ValueError(
                f"{name} ({type(module).__name__}) draws another mask at every step, and the rate pass has one "
                "only: use sltt.Dropout, or SLTT"
            )
    return layers


def _keeps_state(module: nn.Module) -> bool:
    """Whether a gradient might flow through a state that the module keeps, in a way that is not known here."""
    if isinstance(module, Stateful):
        return module.differentiable and not isinstance(module, Dropout)
    return bool(state_names(module))
