"""Losses: of one time step, `loss(logits [B, C], target [B]) -> scalar`, or of a whole sequence [T, B, C].

A rule takes the mean over T of a loss of one step. For regression and multi-label targets use PyTorch's losses.
"""

import inspect
from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sltt.checks import flag, function, instance, number
from sltt.sequence.hooks import own_forward, runs_hooks
from sltt.sequence.padding import Padded, lengths_of, real_steps, target_of
from sltt.sequence.run import Run
from sltt.sequence.spikes import observe_spikes

Prediction = Literal["mean", "last", "max", "steps"]


class Loss(nn.Module):
    """Base class of losses that say how a network predicts. Any callable `loss(logits, target) -> scalar` works too.

    Attributes:
        prediction: what it predicts by: the "mean" or the "last" of the logits over time, "max", each logit's largest,
            or "steps", those of each step.
        per_step: targets are sequences [T, B, ...], one target for each time step.
    """

    prediction: Prediction = "mean"
    per_step: bool = False
    higher_is_better = False  # as a metric


class CrossEntropyMSE(Loss):
    """ℓ(o, y) = (1 − α) CE(o, y) + α MSE(o, m): the loss of the SLTT paper (Meng et al. 2023).

    m is the constant 1.0 for every class, or the one-hot vector of y.

    Args:
        alpha: share of the mean squared error, in [0, 1].
        one_hot: m is the one-hot vector of y, as for DVS-CIFAR10; else the constant 1.0.
        label_smoothing: smoothing of the cross entropy's target, in [0, 1).
    """

    def __init__(self, alpha: float = 0.05, one_hot: bool = False, label_smoothing: float = 0.0):
        super().__init__()
        self.alpha = number("alpha", alpha, least=0, most=1)
        self.one_hot = flag("one_hot", one_hot)
        self.label_smoothing = number("label_smoothing", label_smoothing, least=0, below=1)

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """Logits o [B, C, ...] and class indices y [B, ...], such as one for each pixel, to a scalar.

        Raises ValueError for labels outside 0 … C − 1, on the CPU; on other devices, where looking at the labels
        would wait for the device at every step, PyTorch's own assertion fires.
        """
        _check_labels(logits, target)
        loss = F.cross_entropy(logits, target, label_smoothing=self.label_smoothing)
        if self.alpha == 0:
            return loss
        goal = torch.ones_like(logits)
        if self.one_hot:
            goal = F.one_hot(target, logits.shape[1]).movedim(-1, 1).to(logits.dtype)
        return (1 - self.alpha) * loss + self.alpha * F.mse_loss(logits, goal)

    def extra_repr(self) -> str:
        return f"alpha={self.alpha}, one_hot={self.one_hot}, label_smoothing={self.label_smoothing}"


class PerStep(Loss):
    """A target for each time step: L = 1/T Σ_t ℓ(o[t], y[t]), where ℓ is 0 if all labels are its `ignore_index`.

    Args:
        loss: ℓ, of one time step.
    """

    prediction = "steps"
    per_step = True

    def __init__(self, loss: nn.Module):
        super().__init__()
        self.loss = _check_one_step(self, loss)

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """Logits [B, C] and targets [B, ...] of one time step to a scalar."""
        value, ignored = self.loss(logits, target), getattr(self.loss, "ignore_index", None)
        return value if ignored is None else torch.where((target == ignored).all(), logits.sum() * 0, value)


class SequenceLoss(Loss):
    """A loss of the logits of all time steps [T, B, C] that is no sum of losses of single steps.

    BPTT (without `segment`) takes it over the sequence, TBPTT over each window, RateBased takes `OfMean`, others none.
    """


class _Of(SequenceLoss):
    """A loss of what is predicted from the sequence."""

    def __init__(self, loss: nn.Module = CrossEntropyMSE()):
        super().__init__()
        self.loss = _check_one_step(self, loss)

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """Logits [T, B, C] and targets [B, ...] to a scalar."""
        return self.loss(predict_from(self.prediction, logits), target)


class OfMean(_Of):
    """ℓ(ō, y) of the mean logits ō = 1/T Σ_t o[t]. RateBased takes it too.

    Args:
        loss: ℓ, of logits [B, C] and targets [B, ...].
    """


class OfLast(_Of):
    """ℓ(o[T], y) of the last time step; under TBPTT, of the last of each window.

    Args:
        loss: ℓ, of logits [B, C] and targets [B, ...].
    """

    prediction = "last"


class OfMax(_Of):
    """ℓ(max_t o[t], y) of each logit's largest value over time.

    Args:
        loss: ℓ, of logits [B, C] and targets [B, ...].
    """

    prediction = "max"


class VanRossum(SequenceLoss):
    """The distance of filtered spike trains (van Rossum 2001): outputs o and targets y, [T, B, C].

        L = 1/T Σ_t mean (z[t])²,   z[t] = (1 − 1/τ) z[t−1] + o[t] − y[t]

    Args:
        tau: time constant of the filter in time steps, at least 1; 1 compares step by step.
    """

    prediction = "steps"
    per_step = True

    def __init__(self, tau: float = 10.0):
        super().__init__()
        self.tau = number("tau", tau, least=1)

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """Outputs and targets [T, B, C] to a scalar; raises ValueError for others."""
        if logits.shape != instance("target", target, Tensor).shape:
            got = f"{list(logits.shape)} and {list(target.shape)}"
            raise ValueError(f"VanRossum compares spike trains of one shape, got {got}")
        z, total = torch.zeros_like(logits[0]), torch.zeros((), device=logits.device)
        for difference in logits - target:
            z = (1 - 1 / self.tau) * z + difference
            total = total + z.square().mean()
        return total / len(logits)


class Activity(Loss):
    """A loss with a penalty on firing rates: ℓ(o[t], y) + w · mean over layers of R(r[t]).

        R = r            without `rate`: fewer spikes
        R = (r − ρ)²     with a `rate` ρ: neither silent nor busy layers

    r[t] is the mean size of a layer's spikes in step t, over samples and neurons. An evaluation has the loss alone.
    Energy falls with the rates: `sltt profile --weights RUN` says by how much.

    Args:
        loss: ℓ, of one time step.
        weight: w.
        rate: ρ, in [0, 1].
        layers: names of layers of neurons, with * and ?.

    Raises ValueError when a rule begins, for no layer of that name, or a rule without gradients of spikes (RateBased).
    """

    def __init__(
        self, loss: nn.Module = CrossEntropyMSE(), weight: float = 0.1, rate: float | None = None, layers: str = "*"
    ):
        super().__init__()
        self.loss = _check_one_step(self, loss)
        self.weight = number("weight", weight, least=0)
        self.rate = None if rate is None else number("rate", rate, least=0, most=1)
        self.layers = instance("layers", layers, str)
        self.prediction, self.per_step = prediction_of(loss), is_per_step(loss)

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """Return the loss without the penalty."""
        return self.loss(logits, target)


def bind_loss(loss: Any, run: Run) -> Any:
    """Return the loss for the time steps of a run: with `Activity`, one that sees the spikes of the network."""
    if not isinstance(loss, Activity):
        return loss
    neurons = run.layout.neurons
    watched = {name: module for name, module in neurons.items() if fnmatchcase(name, loss.layers)}
    if not watched:
        raise ValueError(f"no layer of neurons is called {loss.layers!r}; there are {', '.join(neurons) or 'none'}")
    of_step = Watching(loss, run)
    run.enter(observe_spikes(watched, of_step.see))
    return of_step


class Watching:
    """`Activity` in a batch: adds the penalty of the spikes since its last call.

    A call of the network folds n time steps. A layer sees them in one call, or in n: its rates are those of n steps.
    """

    def __init__(self, loss: Activity, run: Run):
        self.loss, self.run, self.per_step = loss, run, loss.per_step
        self.steps, self.rates = 1, dict[str, list[Tensor]]()

    def see(self, name: str, spikes: Tensor) -> None:
        self.steps = self.run.steps
        spikes = torch.where(spikes < 0, -spikes, spikes)  # abs has no gradient at 0, where neurons are silent
        rates = spikes.unflatten(0, (self.run.fold, -1)).flatten(1).mean(1)
        self.rates.setdefault(name, []).append(rates)

    def __call__(self, logits: Tensor, target: Any) -> Tensor:
        return self.loss(logits, target) + self.penalty()

    def penalty(self) -> Tensor | float:
        """Return the penalty of the spikes since the last call."""
        if not self.rates:  # of the second and later steps in one call of the network
            return 0.0
        rates = [torch.cat(of_layer) for of_layer in self.rates.values()]
        if torch.is_grad_enabled() and not any(r.requires_grad for r in rates):
            raise ValueError("the rule has no gradients of spikes, and Activity needs them: use SLTT or BPTT")
        self.rates.clear()
        goal = self.loss.rate
        of_layers = [(r if goal is None else (r - goal).square()).mean() for r in rates]
        return self.loss.weight * self.steps * torch.stack(of_layers).mean()


def predict_from(by: Prediction, logits: Tensor, lengths: Sequence[int] | None = None) -> Tensor:
    """Return the prediction from the logits [T, B, C]: [B, C], or [T, B, C] for each step.

    With `lengths`, from the real steps of each sample alone.
    """
    if by == "steps":
        return logits
    if lengths is None:
        return logits[-1] if by == "last" else logits.amax(0) if by == "max" else logits.mean(0)
    real = real_steps(lengths, len(logits), logits)
    if by == "last":
        return logits[real.sum(0) - 1, torch.arange(logits.shape[1], device=logits.device)]
    shape = *real.shape, *[1] * (logits.ndim - 2)
    if by == "max":
        return logits.masked_fill(~real.view(shape), -torch.inf).amax(0)
    return (logits * real.view(shape)).sum(0) / real.sum(0).view(shape[1:])


def to_score(loss: Any, logits: Tensor, target: Any) -> tuple[Tensor, Any]:
    """Return the prediction from the logits [T, B, C] and its target, as a metric takes them; of real steps alone."""
    lengths, y = lengths_of(target), target_of(target)
    prediction = predict_from(prediction_of(loss), logits, lengths)
    if lengths is None or not is_per_step(loss):
        steps_are_samples = is_per_step(loss) and prediction.ndim > y.ndim  # each has a class
        return (prediction.flatten(0, 1), y.flatten(0, 1)) if steps_are_samples else (prediction, y)
    real = real_steps(lengths, len(logits), logits)
    return prediction[real], y[real]


def prediction_of(loss: Any) -> Prediction:
    """Return the prediction of a loss; the mean for a callable that does not say."""
    return getattr(loss, "prediction", "mean")


def keeps_mean(loss: Any, target: Any) -> bool:
    """Return whether a training needs the mean of the logits alone, not those of all time steps."""
    return prediction_of(loss) == "mean" and not isinstance(target, Padded)


def _check_one_step(outer: Loss, loss: Any) -> Any:
    """Return the loss inside another; raise ValueError for one that has no value for one time step."""
    if isinstance(loss, SequenceLoss):
        inner = f"{type(loss).__name__} has none: use a loss of one step, such as CrossEntropyMSE()"
        raise ValueError(f"{type(outer).__name__} is made of the loss of one time step, and {inner}")
    if isinstance(loss, Activity):
        raise ValueError(f"Activity sees spikes as the outermost loss alone, and it is inside {type(outer).__name__}")
    return check_loss(loss)


def check_loss(loss: Any) -> Any:
    """Return the loss; raise ValueError for what is none, and for one that takes the logits of all time steps."""
    for module in ("snntorch.functional", "spikingjelly.activation_based.functional"):
        if str(getattr(loss, "__module__", "")).startswith(module):
            name = getattr(loss, "__name__", type(loss).__name__)
            remedy = "docs/interop.md lists ours; else call it in a sltt.losses.SequenceLoss, under BPTT()"
            raise ValueError(f"{name} of {module} takes the logits of all time steps at once: {remedy}")
    return function("loss", loss, "the logits and the target")


def is_per_step(loss: Any) -> bool:
    """Return whether a loss takes a target for each time step."""
    return getattr(loss, "per_step", False)


_MEANS = {F.cross_entropy, F.mse_loss, F.l1_loss, F.smooth_l1_loss, F.binary_cross_entropy_with_logits}
_MEAN_MODULES = nn.CrossEntropyLoss, nn.MSELoss, nn.L1Loss, nn.SmoothL1Loss, nn.BCEWithLogitsLoss


def is_mean(loss: Any) -> bool:
    """Return whether a loss is a mean over samples, which may take those of several time steps at once."""
    by_module = type(loss) in _MEAN_MODULES and loss.reduction == "mean"
    if isinstance(loss, nn.Module) and (own_forward(loss, type(loss)) or runs_hooks(loss)):
        return False
    if type(loss) is nn.BCEWithLogitsLoss:  # its weights may have a value for each sample
        by_module = loss.weight is None and (loss.pos_weight is None or loss.pos_weight.ndim < 2) and by_module
    return by_module or type(loss) is CrossEntropyMSE or (inspect.isfunction(loss) and loss in _MEANS)


def _check_labels(logits: Tensor, target: Tensor) -> None:
    instance("logits", logits, Tensor)
    instance("target", target, Tensor)
    if logits.ndim < 2 or target.shape != logits.shape[:1] + logits.shape[2:]:
        remedy = "end the model with nn.Flatten() and a linear layer; sequences need static=False"
        if logits.ndim == 2:
            remedy = "labels are class indices, one a sample: y.squeeze(1) of [B, 1], y.argmax(1) of one-hot labels"
        got = f"{list(logits.shape)} and {list(target.shape)}"
        raise ValueError(f"expected logits [B, C] and labels [B], got {got}; {remedy}")
    if target.dtype != torch.int64:
        raise ValueError(f"labels must be class indices in int64, got {target.dtype}; use target.long()")
    if target.device.type != "cpu" or not len(target):
        return
    least, most, classes = int(target.min()), int(target.max()), logits.shape[1]
    if not 0 <= least <= most < classes:
        got = f"{least} … {most}; set the model's `classes` to the data's"
        raise ValueError(f"labels must be in 0 … {classes - 1} (the model has {classes} outputs), got {got}")
