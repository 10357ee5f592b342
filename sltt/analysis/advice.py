"""Advise a rule, from the gradients of one batch and from short trainings.

A high cosine is a hint: over many steps, a small part that is always dropped can count. A low one is not a reason
against a rule, since the network may not need what the rule drops. A short training with each rule tells more. Neither
is sure: only the test samples after full trainings say what is safe (`sltt.commands.verdict`).
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from sltt.analysis.agreement import AGREES, Agreement

# A rule that takes off less of the loss than this share of what BPTT takes off learns less than BPTT.
LEARNS = 0.9
# A rule that classifies this share of the training samples has solved the task; what is left of the loss is confidence.
SOLVED = 0.98
LESS = 1.05  # BPTT's memory over that of a rule that saves some
# Said where BPTT is advised: the steps of small layers that share a call take a few MB, whatever the rule.
SHARED = " Time steps share a call, so most rules save no memory: try --rule.fold 1."
DELAYS = (
    " Before BPTT, where the input changes over time, try SLTT with delays as long as the task needs: on the input, at "
    "SLTT's memory and time, then between layers, at memory that does not grow with T and up to 1.4 times the time "
    "(sltt.Delay)."
)
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
        """Return (L₀ − L) / (L₀ − L of BPTT), of each seed: 1 where a rule learns as BPTT, NaN where BPTT does not."""
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


def choose_rule(agreements: Sequence[Agreement], trial: Trial | None = None) -> str:
    """Return the rule of least memory that learns as BPTT does in the trial, or else agrees with it on the batch.

    `found` has rules in the order of their memory, least first.
    """
    if trial and trial.tells:
        return next(rule for rule in trial.losses if min(trial.shares(rule)) >= LEARNS or trial.solves(rule))
    return next((a.rule for a in agreements if a.least >= AGREES), "BPTT()")


def advice(
    agreements: Sequence[Agreement],
    trial: Trial | None = None,
    memory: Mapping[str, int] | None = None,
    *,
    fold: int = 1,
    epochs: int = 0,
    samples: int | None = None,
    training: int = 0,
) -> str:
    """Return sentences: which rule to take, on what this rests, and what it costs.

    Args:
        agreements: of rules in the order of their memory, least first.
        trial: short trainings with the rules.
        memory: bytes of a batch at the peak, by rule.
        fold: time steps that share a call there.
        epochs: for which the network was trained before its gradients were compared.
        samples: in the batch whose memory was measured.
        training: epochs of the whole training; 0 where it is not known.
    """
    rule = choose_rule(agreements, trial)
    names = [a.rule for a in agreements]
    passed = names[: names.index(rule) if rule in names else None]
    doubts = f" of {name_rules(passed)}, which would save memory" if passed and rule != "BPTT()" else ""
    rests = _rest_on_trial(trial, training) if trial else _rest_on_gradients(agreements, epochs)
    take, delays = f"Take {name_rules([rule])}", DELAYS * (rule == "BPTT()")
    if memory is None or rule not in memory:
        return f"{take}. Not sure{doubts}: {rests}{delays}"
    of = "" if samples is None else f" of {samples}"
    shared = SHARED * (fold > 1 and rule == "BPTT()")
    return f"{take}. Not sure{doubts}: {rests} A batch{of} takes {_sizes(rule, memory)}.{shared}{delays}"


def name_rules(rules: Iterable[str]) -> str:
    """Write rules as the command line does: SLTT, OTTT."""
    return ", ".join(rule.removesuffix("()") for rule in rules)


def count_of(number: int, noun: str) -> str:
    """Write a number and what it counts: 1 seed, 2,000 test samples."""
    return f"{number:,} {noun}{'s' * (number != 1)}"


def _sizes(rule: str, memory: Mapping[str, int]) -> str:
    """Write the memory of a batch with a rule, and with the others."""
    sizes = {name: f"{nbytes / 1e6:.3g} MB" for name, nbytes in memory.items()}
    others = (f"{size} with {name_rules([name])}" for name, size in sizes.items() if name != rule)
    return f"{sizes[rule]} ({', '.join(others)})"


def _rest_on_gradients(agreements: Sequence[Agreement], epochs: int) -> str:
    """Say what the advice without a trial rests on."""
    network = f"after {count_of(epochs, 'epoch')}" if epochs else "of an untrained network"
    worst = ", ".join(f"{name_rules([a.rule])} {a.least:.3f}" for a in agreements if a.rule != "BPTT()")
    return (
        f"this rests on the gradients of one batch {network} (worst cosine: {worst}; {AGREES} needed). --trial trains "
        "for some epochs, and sltt compare for all."
    )


def _rest_on_trial(trial: Trial, training: int) -> str:
    """Say what the advice of a trial rests on."""
    of = f" of {training}" if training > trial.epochs else ""
    length = f"{trial.epochs}{of} epoch{'s' * (max(trial.epochs, training) != 1)}"
    if not trial.tells:
        return f"BPTT learned little in {length}, so the gradients of one batch decide. Give a longer --trial."
    learned = {name: trial.shares(name) for name in trial.losses if name != "BPTT()"}
    decreases = "; ".join(f"{name_rules([name])} {_range(shares)}" for name, shares in learned.items())
    solved = [name for name in learned if trial.solves(name)]
    split = [name for name in learned if name not in solved and min(learned[name]) < LEARNS <= max(learned[name])]
    notes = [f" Seeds disagree about {name_rules(split)}."] if split else []
    if solved:
        notes.append(f" {name_rules(solved)} got {SOLVED:.0%} of the training samples right, which is enough too.")
    if trial.epochs < EARLY * training:
        notes.append(" Rules may part later: give a longer --trial.")
    return (
        f"this rests on training losses of {count_of(len(trial.start), 'seed')} after {length} (of BPTT's decrease: "
        f"{decreases}; {LEARNS:.0%} needed).{''.join(notes)} sltt compare trains for all epochs."
    )


def _range(shares: Sequence[float]) -> str:
    """Write the smallest and the largest share of the seeds; a rule that died with one has none."""
    if math.isinf(min(shares)):
        return "died"
    low, high = f"{min(shares):.0%}", f"{max(shares):.0%}"
    return low if low == high else f"{low} to {high}"
