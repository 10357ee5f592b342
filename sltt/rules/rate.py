"""Rate-based backpropagation: one pass over firing rates, recorded in T steps without a graph or made on the way."""

import warnings
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from sltt import kernels
from sltt._torch import _BatchNorm, _DropoutNd
from sltt.checks import flag
from sltt.losses import OfMean, is_per_step
from sltt.neurons import IntegrateAndFire, Neuron, Recurrent
from sltt.neurons.base import check_forward
from sltt.neurons.dropout import Dropout
from sltt.neurons.pooling import RunningMax
from sltt.rules.base import Rule
from sltt.rules.batch import Batch, Fold, Output, step_loss
from sltt.rules.folding import choose_fold, fold_of
from sltt.rules.segments import split
from sltt.sequence.hooks import own_forward
from sltt.sequence.layout import Layer
from sltt.sequence.run import Run
from sltt.sequence.snapshot import Buffers
from sltt.sequence.spikes import show, watches
from sltt.sequence.step import NEURON, Step
from sltt.sequence.steps import in_backward


class RateBased(Rule):
    """Rate-based backpropagation: one backward pass per sequence, through mean firing rates instead of spikes.

        c = W r^{l−1},   r = 1/T Σ_t s[t]                               rate pass              (1)
        ∂r/∂c = 1/T Σ_t ∂s[t]/∂u[t] f[t]                                collected in T steps   (2)
        f[t] = 1 + λ ∂v[t−1]/∂u[t−1] f[t−1],   f[1] = 1                 through leak and reset (3)
        ∂v/∂u = 1 − V_th ∂s/∂u     soft reset;  1 with `detach_reset`                          (4)
        ∂v/∂u = 1 − s − (u − v_r) ∂s/∂u     hard reset;  1 − s with `detach_reset`             (5)

    (2) is the derivative of the rate with respect to a constant that is added to the input. With `decay_input`, 1 − λ
    takes the place of 1 in (3). Neurons with other
    equations have it by forward differentiation of their `step`, also with respect to parameters that learn. A
    `Recurrent` layer reads the mean of the spikes that came back, and no gradient goes round.

    The T steps run without a graph. Then the network runs once with a graph, on the mean input, with r in place of
    spikes. The gradient drops differences between time steps. Memory: the graph of one step, and for each layer of
    neurons two tensors, and two for each state; with each parameter that learns, as many again.

    The loss is ℓ(ō, y) of the mean logits ō = 1/T Σ_t o[t], and `Output.loss` is its value. The gradient has the size
    of BPTT's; with T = 1 it is that of SLTT and BPTT.

    Args:
        steady: skip the T steps of the network. Each layer of neurons runs T steps under its mean current instead. A
            batch costs about what it costs with ReLU. `Output.logits` are those of the rates: train the last epochs
            with another rule.
        fold: time steps in one call of the network, see `Truncated`.

    Raises:
        ValueError: fold < 1 or together with steady; when called, a module with a state that is no `Neuron` or
            `RunningMax`; with `steady`, a `Recurrent` layer. Without `steady`, a neuron or BatchNorm that does not run
            exactly once per step, BatchNorm with a forward of its own (SyncBatchNorm), or a dropout module of
            PyTorch's, whose mask changes at every step.

    Source: Yu et al., NeurIPS 2024 (arXiv 2410.11488); (3) to (5) as in the authors' code
    (github.com/Tab-ct/rate-based-backpropagation, model/layer.py), where V_th = 1 and v_r = 0.
    """

    sequence_losses = (OfMean,)
    pads = False
    reads_logits = True

    def __init__(self, steady: bool = False, fold: int | Literal["auto"] = "auto"):
        self.steady, self.fold = flag("steady", steady), fold_of(fold)
        if steady and self.fold not in (1, "auto"):
            raise ValueError("steady runs the network once, and fold several time steps of it in a call: choose one")

    def run(self, batch: Batch) -> Output:
        if is_per_step(batch.loss):
            raise ValueError("RateBased has mean logits only, and the loss takes targets for each time step: use SLTT")
        return self._run_steady(batch) if self.steady else self._run_recorded(batch)

    def choose_fold(self, network: Run, loss: Any = None) -> Fold:
        return Fold() if self.steady else choose_fold(network, self.fold, loss=loss)  # of steps without a graph

    def step(self) -> Step:
        return _RateStep("steady" if self.steady else "step")

    def _run_steady(self, batch: Batch) -> Output:
        logits = batch.rates()
        value = _loss(batch, logits)
        batch.backward(value)
        return Output(value.detach(), logits.detach().expand(batch.steps, *logits.shape))

    def _run_recorded(self, batch: Batch) -> Output:
        recording: Any = batch.network.step
        for call in split(range(batch.steps), batch.fold.forward):
            batch.run(call, graph=False)
            recording.check(call.stop)
        logits = torch.stack([batch.logits(t) for t in range(batch.steps)])
        buffers = Buffers(batch.network)
        recording.what = "rate"  # also in a checkpoint, which runs layers again in the backward
        try:
            value = _loss(batch, _with_value(logits.mean(0), batch.rates()))
            batch.backward(value)
        finally:
            buffers.restore()
        return Output(value.detach(), logits)


class _RateStep(Step):
    """Layers in the T steps, which gather what the rate pass needs; in it; or in a pass of steady currents."""

    def __init__(self, what: str):
        self.what = what  # the method of `_RateLayer` that runs: "step", "rate" or "steady"
        self.gathered: dict[Layer, _RateLayer] = {}

    def handler(self, layer: Layer, folds: bool) -> Any:
        if (made := _make_layer(layer, self.what == "steady", self.run.sequence.steps)) is None:
            runs = ("weight", "pool", "keeper") if folds else ("weight", "pool")
            return super().handler(layer, folds) if layer.role.kind in runs else None
        self.gathered[layer] = made
        return self.layer

    def layer(self, layer: Layer, x: Tensor) -> Tensor:
        """Run the layer in this pass."""
        if layer.spikes and not in_backward():
            self.run.take_turn(layer, NEURON)
        self.run.counts_spikes = self.what == "step"
        forward = getattr(self.gathered[layer], self.what)
        return forward(x) if self.what != "step" else self.run.one_by_one(layer, (x,), {}, forward)

    def pair(self, norm: Layer, neuron: Layer, x: Tensor) -> Tensor | None:
        return None

    def check(self, steps: int) -> None:
        """Raise ValueError unless every layer ran once in each of the steps so far, or never."""
        for layer in self.gathered.values():
            layer.check(steps)


def _loss(batch: Batch, logits: Tensor) -> Tensor:
    """Return the loss of the mean logits [B, C]."""
    return step_loss(batch.loss, logits.unsqueeze(0) if batch.whole else logits, batch.target)


def _with_value(value: Tensor, x: Tensor) -> Tensor:
    """Return the numbers of `value`, with the gradient of x: x − x is 0 to the last bit."""
    return value + (x - x.detach()).to(value.dtype)


class _RateLayer:
    """Sums of a layer over the T = `steps` steps, for the rate pass."""

    def __init__(self, layer: Layer, steps: int):
        self.layer, self.module, self.steps = layer, layer.module, steps
        self.calls = 0

    def check(self, steps: int) -> None:
        """Raise ValueError unless the layer ran once in each of the steps so far, or never."""
        if self.calls not in (0, steps):
            raise ValueError(f"{self.layer} ran {self.calls} times in {steps} time steps: RateBased keeps one rate")

    def count(self) -> int:
        """Return in how many time steps the layer ran."""
        if not self.calls:
            raise ValueError(f"{self.layer} does not run in the time steps as it does on their mean input: use SLTT")
        return self.calls


class _NeuronLayer(_RateLayer):
    """Neurons, whose rate and its derivatives are gathered."""

    def __init__(self, layer: Layer, steps: int):
        super().__init__(layer, steps)
        self.spikes: Any = None
        self.by: list[kernels.Sensitivity] = []  # to the input, and to the parameters that learn

    def step(self, x: Tensor) -> Tensor:
        self.calls += 1
        neuron = self.module
        before = [getattr(neuron, name) for name in neuron.states]
        s = type(neuron).forward(neuron, x)
        with torch.enable_grad():  # to see which parameters learn
            function, parameters = neuron.as_function(x)
        if self.spikes is None:
            self.spikes = torch.zeros_like(s, dtype=torch.promote_types(neuron.state_type(x), torch.float32))
            learned = [i for i, p in enumerate(parameters) if p.requires_grad]
            self.by = [kernels.Sensitivity(function, parameter) for parameter in (None, *learned)]
            before = [torch.full_like(x, v, dtype=neuron.state_type(x)) for v in neuron.first_states().values()]
        self.spikes.add_(s)
        for sensitivity in self.by:
            sensitivity.add(x, before, [p.detach() for p in parameters])
        return s

    def rate(self, x: Tensor) -> Tensor:
        check_forward(self.module)
        n, (_, parameters) = self.count(), self.module.as_function(x)
        self.module.reset()  # what the T steps left goes, layer by layer
        by_input, *by_parameters = (sensitivity.total.div_(n) for sensitivity in self.by)
        rate = self.spikes.div_(n).to(x.dtype)
        self.calls, self.spikes, self.by = 0, None, []
        learned = (p for p in parameters if p.requires_grad)
        return _Rate.apply(x, rate, by_input.to(x.dtype), by_parameters, *learned)  # type: ignore[return-value]

    def steady(self, x: Tensor) -> Tensor:
        if (rate := self._steady_by_kernel(x)) is not None:
            return rate
        with torch.no_grad():
            for _ in range(self.steps):
                show(self.module, self.step(x))
        return self.rate(x)

    def _steady_by_kernel(self, x: Tensor) -> Any:
        """Return the rate from one native pass over all time steps; None where there is none."""
        module, steps, seen = self.module, self.steps, watches(self.module)
        step, decay = module.kernel_step() if isinstance(module, IntegrateAndFire) else (None, None)
        # of a rate in 16 bits, a short sequence leaves the number of spikes to be told
        counts = all(watch.counts for watch in seen) and (not seen or steps * torch.finfo(x.dtype).eps <= 0.5)
        if step is None or not counts:
            return None
        with torch.no_grad():
            means = kernels.steady_means(step, x, steps, module.state_type(x), module.start, decay)
            if means is None:
                return None
            for watch in seen:
                watch.see(watch.name, _spikes(means[0], steps), x.numel() * steps)
        return _Rate.apply(x, *means[:2], means[2:], *(() if decay is None else (decay,)))


def _spikes(rate: Tensor, steps: int) -> Tensor:
    """Return the number of spikes in T steps."""
    numbers = (rate * steps).round_()
    return numbers.flatten(1).sum(1, dtype=torch.float32).sum(dtype=torch.int64)  # those of a sample are exact


class _Rate(torch.autograd.Function):
    """The rate, with the derivatives that were gathered."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: Tensor, rate: Tensor, by_input: Tensor, by_parameters: Sequence[Tensor], *parameters: Tensor
    ) -> Tensor:
        ctx.save_for_backward(by_input, *by_parameters)
        ctx.shapes = [p.shape for p in parameters]
        return rate

    @staticmethod
    @kernels.differentiable_once
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        by_input, *by_parameters = ctx.saved_tensors
        of_parameters = ((grad * by).sum_to_size(shape) for by, shape in zip(by_parameters, ctx.shapes, strict=True))
        return grad * by_input, None, None, None, *of_parameters


class _RecurrentLayer(_RateLayer):
    """Recurrence, whose rate pass reads the mean of the spikes that came back; no gradient goes round."""

    back: Tensor | float = 0.0

    def step(self, x: Tensor) -> Tensor:
        self.calls += 1
        if self.module.s is not None:
            self.back = self.back + self.module.s
        return Recurrent.forward(self.module, x)

    def rate(self, x: Tensor) -> Tensor:
        self.module.s = torch.zeros_like(x) + self.back / self.count()
        spikes = Recurrent.forward(self.module, x)
        self.module.reset()
        return spikes

    def steady(self, x: Tensor) -> Tensor:
        raise ValueError(f"{self.layer} reads spikes of the step before: use RateBased() without steady, or SLTT")


class _PoolLayer(_RateLayer):
    """A pooling of sums over time: the mean of what it gives is the pooling of the mean input."""

    def step(self, x: Tensor) -> Tensor:
        self.calls += 1
        return RunningMax.forward(self.module, x)

    def rate(self, x: Tensor) -> Tensor:
        self.module.reset()  # what the T steps left goes, layer by layer
        return self.module.pool(x)

    def steady(self, x: Tensor) -> Tensor:
        return self.rate(x)


class _NormLayer(_RateLayer):
    """BatchNorm, whose rate pass normalises as the T steps did, by the means over time of their statistics.

    Time averages, so the deviation of the mean input is smaller, and would make the gradient too large.
    """

    mean: Any = 0.0
    inverse: Any = 0.0

    def step(self, x: Tensor) -> Tensor:
        """Do as `_BatchNorm.forward`, by the operator that gives the statistics too."""
        self.calls += 1
        norm = self.module
        norm._check_input_dim(x)
        if x.numel() == x.shape[1]:
            raise ValueError(f"BatchNorm needs more than one value a channel, got {list(x.shape)}: use a larger batch")
        running, (momentum,) = kernels.batch_statistics(norm, 1)
        kept = running or (None, None)
        y, mean, inverse = torch.native_batch_norm(x, norm.weight, norm.bias, *kept, True, momentum, norm.eps)
        self.mean, self.inverse = self.mean + mean, self.inverse + inverse
        return y

    def rate(self, x: Tensor) -> Tensor:
        norm, n = self.module, self.count()
        values = x.to(torch.promote_types(x.dtype, torch.float32))
        var, mean = torch.var_mean(values, [0, *range(2, x.ndim)], correction=0)
        mean = _with_value(self.mean / n, mean)
        scale = torch.rsqrt(_with_value((self.inverse / n) ** -2, var))
        scale = scale if norm.weight is None else scale * norm.weight
        shift = -mean * scale if norm.bias is None else norm.bias - mean * scale
        form = (-1, *[1] * (x.ndim - 2))
        return (x * scale.view(form) + shift.view(form)).to(x.dtype)


def _make_layer(layer: Layer, steady: bool, steps: int) -> _RateLayer | None:
    """Return what a layer sums; None if it runs as it is. Raise ValueError naming one without a rate pass."""
    module = layer.module
    # the class whose forward runs the neuron's `step`, and nothing else that a gradient passes
    kinds = {Neuron: _NeuronLayer, Recurrent: _RecurrentLayer, RunningMax: _PoolLayer}
    kind = next((kind for kind in kinds if isinstance(module, kind)), None)
    if kind and not own_forward(module, kind):
        return kinds[kind](layer, steps)
    if layer.differentiable and not isinstance(module, Dropout):
        raise ValueError(f"RateBased knows the derivative of a `step` of sltt.Neuron, not of {layer}: use SLTT")
    if steady:
        return None
    if isinstance(module, _BatchNorm) and (module.training or module.running_mean is None):
        if own_forward(module, _BatchNorm):
            raise ValueError(f"RateBased knows PyTorch's plain BatchNorm, not {layer}: use that, or SLTT")
        return _NormLayer(layer, steps)
    own = isinstance(module, nn.modules.instancenorm._InstanceNorm) and (module.training or module.running_mean is None)
    if own or isinstance(module, nn.LayerNorm | nn.GroupNorm | nn.RMSNorm):
        small = "divides by the deviation of the mean input, which is smaller: its gradients are too large"
        warnings.warn(f"the rate pass of {layer} {small}; use BatchNorm, or SLTT", stacklevel=1)
    if isinstance(module, _DropoutNd) and module.training and module.p > 0:
        raise ValueError(f"{layer} draws a mask at every step, and the rate pass has one: use sltt.Dropout, or SLTT")
    return None
