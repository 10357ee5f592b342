"""Say of each rule what it costs, what it reaches, and whether it is safe: the one verdict of a folder of results."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from sltt.commands.results import Gathered
from sltt.commands.vary import best_of
from sltt.metrics import finite_scores, is_share, score_text

MARGIN = 0.01  # of accuracy: a smaller loss is called none
OF_AN_ERROR = 0.05  # the same of other metrics, as a part of the reference's


@dataclass
class Verdict:
    """One rule, from what was measured; what was not is empty."""

    rule: str
    scores: list[float] = field(default_factory=list)  # the metric on the test samples, one for each seed
    metric: str = "accuracy"
    sign: int = 1  # where more is better, −1 for an error
    samples: int | None = None  # for the test
    seconds: tuple[float, float, float] | None = None  # of an epoch, or else of a batch: median, least and most
    memory: dict[int | None, int] = field(default_factory=dict)  # bytes of a training batch, for each T
    cosine: float | None = None  # of its gradient with that of BPTT
    died: int = 0  # seeds without a score

    @property
    def score(self) -> float | None:
        """Return the mean over the seeds."""
        return statistics.mean(self.scores) if self.scores else None


def verdicts(found: Gathered) -> list[Verdict]:
    """Return the rules that were compared or profiled, in the order in which they were asked for."""
    rules: dict[str, Verdict] = {}
    for one in _same_recipe(found, found.comparisons):
        for row in one["rows"]:
            scores = finite_scores(row["scores"])
            died = len(row["scores"]) - len(scores) + len(row.get("errors", ()))
            if scores or died:
                rules[row["rule"]] = Verdict(
                    row["rule"],
                    scores,
                    one["metric"],
                    1 if one["higher_is_better"] else -1,
                    one.get("samples"),
                    _seconds_of_seeds(row),
                    {row.get("steps") or one.get("steps"): row["peak_memory"]} if row["peak_memory"] else {},
                    row["cosine"],
                    died,
                )
    for one in _same_recipe(found, found.profiles):
        for row in one["costs"]:
            rule = rules.setdefault(row["rule"], Verdict(row["rule"]))
            rule.memory.setdefault(row["steps"], batch_memory(row["memory"]))
            if not found.comparisons:  # whose seconds are those of an epoch
                rule.seconds = tuple(row["seconds"][key] for key in ("total", "least", "most"))
    return list(rules.values())


def _seconds_of_seeds(row: dict[str, Any]) -> tuple[float, float, float] | None:
    """Return the median of an epoch's seconds, and the least and the most of the medians of single seeds."""
    each = finite_scores(row["seconds_of_seeds"])
    return (row["seconds"], min(each), max(each)) if each else None


def was_compared(found: Gathered, recipe: str) -> bool:
    """Return whether trainings decide which rules are safe on a recipe; gradients and trials then say less."""
    return any(one["recipe"] == recipe for one in found.comparisons) and len(verdicts(found)) > 1


def shared_steps(rules: Sequence[Verdict]) -> int | None:
    """Return the T at which the memory of most rules is known; of several the first, at which they were trained."""
    known = [steps for rule in rules for steps in rule.memory]
    return max(known, key=known.count, default=None)


def _same_recipe(found: Gathered, kind: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the first result of a kind that is of the same recipe as the first of all."""
    first = next(iter([*found.comparisons, *found.profiles, *found.agreements]), {})
    return [one for one in kind if one.get("recipe") == first.get("recipe")][:1]


def batch_memory(parts: dict[str, int]) -> int:
    """Return what a training batch allocates above weights, gradients, optimizer and input."""
    return parts["states"] + parts["saved"] + parts["rest"]


def answers(found: Gathered) -> list[str]:
    """Return a sentence for each rule beside BPTT, or beside the first one; without these the advice on gradients.

    Where options vary, return the best values instead, by the validation samples.
    """
    for one in found.comparisons[:1]:
        if any(row.get("varied") for row in one["rows"]):
            return [best_of(one["rows"], one["metric"], one["higher_is_better"])]
    rules = verdicts(found)
    reference = next((one for one in rules if one.rule == "BPTT"), rules[0] if rules else None)
    said = [_sentence(one, reference) for one in rules if reference is not None and one is not reference]
    return [text for text in said if text] or [row["advice"] for one in found.agreements for row in one["rows"]]


def _sentence(one: Verdict, reference: Verdict) -> str:
    reached, safe = _compare_scores(one, reference)
    parts = [reached] if reached else []
    both = sorted((steps for steps in one.memory if steps in reference.memory), key=lambda steps: steps or 0)
    saved = [(steps, reference.memory[steps] / one.memory[steps]) for steps in both[-2:] if one.memory[steps]]
    if saved:
        parts.append(" and ".join(f"{_times(ratio)} memory{f' at T = {t}' if t else ''}" for t, ratio in saved))
    if one.seconds and reference.seconds:
        parts.append(f"{_ratio(one.seconds, reference.seconds)} × the time")
    if one.cosine is not None and not math.isnan(one.cosine):
        parts.append(f"gradient agreement {one.cosine:.2f}")
    seeds = " One seed: repeat with --seeds 3." if min(len(one.scores), len(reference.scores)) == 1 else ""
    if one.died:
        safe = " Not safe here."
    died = [rule for rule in (one, reference) if rule.died]
    parts += [f"{rule.died} of {rule.died + len(rule.scores)} seeds of {rule.rule} died" for rule in died]
    return f"{one.rule}: {', '.join(parts)}.{safe}{seeds}" if parts else ""


def _ratio(seconds: tuple[float, float, float], others: tuple[float, float, float]) -> str:
    """Divide the medians; bound the ratio by the extremes, where there is more than one of each."""
    (middle, least, most), (other, lowest, highest) = seconds, others
    bounds = f" ({least / highest:.2f} – {most / lowest:.2f})" if least < most or lowest < highest else ""
    return f"{middle / other:.2f}{bounds}"


def _compare_scores(one: Verdict, reference: Verdict) -> tuple[str, str]:
    """Say what a rule reaches beside another, and whether it is safe; nothing where the two were not trained."""
    if one.score is None or reference.score is None:
        return "", ""
    name, other = one.metric.replace("_", " "), reference.rule
    lost, noise = one.sign * (reference.score - one.score), noise_of(one, reference)
    if not is_share(one.metric):
        text = f"{name} {score_text(one.metric, one.score)}, {other} {score_text(one.metric, reference.score)}"
        told = min(len(one.scores), len(reference.scores)) > 1
        measured, margin = f"±{score_text(one.metric, noise)}", OF_AN_ERROR * abs(reference.score)
        return text, _judge(lost, noise, margin, measured) if told else ""
    points = f"{100 * lost:.1f} points"
    text = f"{name} within {points} of {other}" if lost > 0 else f"{name} not below that of {other}"
    text = f"{name} {points} below {other}" if lost > MARGIN else text
    return text, _judge(lost, noise, MARGIN, f"±{100 * noise:.0f} points")


def _judge(lost: float, noise: float, margin: float, measured: str) -> str:
    """Say whether a rule that loses so much, `measured` to so much, is safe."""
    if lost > margin and lost > noise:
        return " Not safe here."
    return " Safe here." if lost <= margin and noise <= 2 * margin else f" Not sure: measured to {measured} only."


def _times(ratio: float) -> str:
    return f"{ratio:.1f} × less" if ratio >= 1.05 else f"{1 / ratio:.1f} × more" if ratio <= 0.95 else "the same"


def noise_of(one: Verdict, other: Verdict) -> float:
    """Twice the standard error of a difference of scores: over the seeds, or of shares of the drawn test samples."""
    pairs = [rule.scores for rule in (one, other)]
    if all(len(several) > 1 for several in pairs):
        return 2 * math.sqrt(sum(statistics.variance(several) / len(several) for several in pairs))
    if one.samples is None:
        return 0.0
    means = [statistics.mean(several) for several in pairs]
    return 2 * math.sqrt(sum(max(0.0, mean * (1 - mean)) / one.samples for mean in means))
