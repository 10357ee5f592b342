"""Advise a rule, from the gradients of one batch and from short trainings.

A high cosine is a hint: over many steps, a small part that is always dropped can count. A low one is not a reason
against a rule, since the network may not need what the rule drops. A short training with each rule decides.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sltt.analysis.agreement import AGREES, Agreement

# A rule that takes off less of the loss than this share of what BPTT takes off learns less than BPTT.
LEARNS = 0.9
# A rule that classifies this share of the training samples has solved the task; what is left of the loss is confidence.
SOLVED = 0.98
# Where BPTT takes off less than this share of the loss, the training was too short to tell rules apart.
BEGINS = 0.01
# Rules part as they learn: a trial of less than this share of a training's epochs is not sure.
EARLY = 0.2


@dataclass(frozen=True)
class Trial:
    """Results of short trainings, each from the same weights and on the same batches.

    Attributes:
        epochs: of each training.
        start: training loss of the untrained network, for each seed.
        losses: training loss of the last epoch, for each seed, by rule; of `BPTT()` and cheaper rules. Of a training
            that died it is infinite.
        accuracies: training accuracy of the last epoch, likewise.
    """

    epochs: int
    start: list[float]
    losses: dict[str, list[float]]
    accuracies: dict[str, list[float]]

    def shares(self, rule: str) -> list[float]:
        """(L₀ − L) / (L₀ − L of BPTT), for each seed: 1 where the rule learns as BPTT does, NaN where BPTT does not."""
        seeds = zip(self.start, self.losses[rule], self.losses["BPTT()"], strict=True)
        return [(start - loss) / (start - exact) if start != exact else math.nan for start, loss, exact in seeds]

    @property
    def tells(self) -> bool:
        """Return whether BPTT has learned enough to compare with."""
        seeds = zip(self.start, self.losses["BPTT()"], strict=True)
        return all(start - exact > BEGINS * abs(start) for start, exact in seeds)

    def solves(self, rule: str) -> bool:
        """Return whether the rule classifies nearly all training samples, with every seed."""
        return min(self.accuracies[rule]) >= SOLVED


def choose_rule(found: Sequence[Agreement], trial: Trial | None = None) -> str:
    """Return the rule of least memory that learns as BPTT does in the trial, or else agrees with it on the batch.

    Args:
        found: agreement of rules in the order of their memory, least first.
        trial: short trainings with the rules.
    """
    if trial and trial.tells:
        return next(rule for rule in trial.losses if min(trial.shares(rule)) >= LEARNS or trial.solves(rule))
    return next((a.rule for a in found if a.least >= AGREES), "BPTT()")


def advice(
    found: Sequence[Agreement],
    trial: Trial | None = None,
    memory: Mapping[str, int] | None = None,
    *,
    epochs: int = 0,
    samples: int | None = None,
    training: int = 0,
) -> str:
    """Sentences: which rule to take, what it drops, what it costs, and how sure this is.

    Args:
        found: agreement of rules in the order of their memory, least first.
        trial: short trainings with the rules.
        memory: bytes of a batch at the peak, by rule.
        epochs: for which the network was trained before its gradients were compared.
        samples: in the batch whose memory was measured.
        training: epochs of the whole training; 0 where it is not known.
    """
    rule = choose_rule(found, trial)
    gradients = {a.rule: a for a in found}
    drops = [_drops(gradients[rule])] if rule in gradients else ["It drops nothing."]
    if found[0].rule != rule:
        drops.append(_drops(found[0], found[0].rule))
    return " ".join(
        [f"Take {rule}.", *drops, *_costs(rule, memory or {}, samples), _confidence(rule, trial, epochs, training)]
    )


def _drops(one: Agreement, name: str = "It") -> str:
    """Return the paths through time that a rule drops, in words."""
    return f"{name} drops {one.dropped:.0%} of the gradient (cosine {one.cosine:.3f}; worst cosine {one.least:.3f})."


def _costs(rule: str, memory: Mapping[str, int], samples: int | None) -> list[str]:
    """Return the memory of a batch with the rule beside that with the others."""
    if rule not in memory:
        return []
    others = ", ".join(f"{nbytes / 1e6:.3g} MB with {name}" for name, nbytes in memory.items() if name != rule)
    size = "" if samples is None else f" of {samples}"
    return [f"A batch{size} takes {memory[rule] / 1e6:.3g} MB ({others})."]


def _confidence(rule: str, trial: Trial | None, epochs: int, training: int) -> str:
    """Say how much the advice rests on."""
    if trial is None:
        rests = f"one batch after {epochs} epoch{'s' * (epochs > 1)}" if epochs else "one batch of an untrained network"
        return f"Not sure: this rests on {rests}. --trial compares short trainings."
    if not trial.tells:
        return f"Not sure: BPTT() learned little in {trial.epochs} epochs. Give a longer --trial."
    learned = {name: trial.shares(name) for name in trial.losses if name != "BPTT()"}
    count = len(trial.start)
    said = ", ".join(f"{name} {_range(shares)}" for name, shares in learned.items())
    solved = ", ".join(name for name in learned if trial.solves(name))
    right = f" {solved} got at least {SOLVED:.0%} of the training samples right: this alone qualifies a rule."
    return (
        f"{_certainty(rule, trial, training)} In {trial.epochs} epochs with {count} seed{'s' * (count > 1)}, {said} "
        f"({LEARNS:.0%} needed).{right if solved else ''}"
    )


def _certainty(rule: str, trial: Trial, training: int) -> str:
    """Say whether seeds and epochs are enough."""
    cheaper = [name for name in trial.losses if name != "BPTT()" and not trial.solves(name)]
    unsure = [name for name in cheaper if min(trial.shares(name)) < LEARNS <= max(trial.shares(name))]
    if unsure:
        return f"Not sure of {unsure[0]}: seeds disagree."
    if trial.epochs < EARLY * training and rule != "BPTT()":
        return f"Not sure: rules may part after {trial.epochs} of {training} epochs. Give a longer --trial."
    return "Sure." if len(trial.start) > 1 else "Fairly sure: one seed."


def _range(shares: Sequence[float]) -> str:
    """Write the smallest and the largest share of the seeds; a rule that died with one has none."""
    if math.isinf(min(shares)):
        return "died"
    low, high = f"{min(shares):.0%}", f"{max(shares):.0%}"
    return f"reached {low if low == high else f'{low} to {high}'} of BPTT's loss decrease"
