"""Say of each rule what it costs, what it reaches, and whether it is safe: the one verdict of a folder of results."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sltt.analysis.advice import DELAYS, LESS, SHARED, count_of, name_rules
from sltt.commands.results import Gathered
from sltt.metrics import finite_scores, is_share, score_text

MARGIN = 0.01  # of accuracy: a smaller loss is called none
OF_AN_ERROR = 0.05  # the same of other metrics, as a part of the reference's
SAFE, UNSAFE, UNSURE = "Safe", "Not safe", "Not sure"
NOT_COMPARED = "BPTT, which is exact, was not compared"


@dataclass
class Verdict:
    """One rule, from what was measured; what was not is empty."""

    rule: str
    scores: list[float] = field(default_factory=list)  # the metric on the test samples, one for each seed
    metric: str = "accuracy"
    sign: int = 1  # where more is better, −1 for an error
    samples: int | None = None  # for the test
    epochs: int | None = None
    seconds: tuple[float, float, float] | None = None  # of an epoch, or a batch: median, and least and most of seeds
    memory: dict[int | None, int] = field(default_factory=dict)  # bytes of a training batch, for each T
    peak: float = math.inf  # the same at the T of the trainings: by this, rules are ranked
    fold: int = 1  # time steps that share a call there
    cosine: float | None = None  # of its gradient with that of BPTT
    died: int = 0  # seeds without a score
    chance: float | None = None  # the score of one answer for all test samples

    @property
    def score(self) -> float | None:
        """Return the mean over the seeds."""
        return statistics.mean(self.scores) if self.scores else None

    @property
    def is_share(self) -> bool:
        """Return whether scores are a share of the samples, or lie between 0 and 1 as one does, such as AUROC."""
        return is_share(self.metric) or (self.sign > 0 and all(0 <= score <= 1 for score in self.scores))

    def rests_on(self) -> str:
        """Name the seeds, the epochs and the test samples."""
        length = f" of {count_of(self.epochs, 'epoch')}" if self.epochs else ""
        samples = f" and {count_of(self.samples, 'test sample')}" if self.samples else ""
        return f"{count_of(len(self.scores), 'seed')}{length}{samples}"


def verdicts(results: Gathered) -> list[Verdict]:
    """Return the rules that were compared or profiled, in the order in which they were asked for."""
    rules: dict[str, Verdict] = {}
    for comparison in _same_recipe(results, results.comparisons):
        for row in comparison["rows"]:
            scores, each = finite_scores(row["scores"]), finite_scores(row["seconds_of_seeds"])
            died = len(row["scores"]) - len(scores) + len(row.get("errors", ()))
            if scores or died:
                of_data = comparison.get("samples"), comparison.get("epochs")
                measured = comparison["metric"], 1 if comparison["higher_is_better"] else -1, *of_data
                seconds, peak = (row["seconds"], min(each), max(each)) if each else None, row["peak_memory"]
                memory = {row.get("steps") or comparison.get("steps"): peak} if peak else {}, peak or math.inf
                rest = row.get("fold", 1), row["cosine"], died, comparison.get("chance")
                rules[row["rule"]] = Verdict(row["rule"], scores, *measured, seconds, *memory, *rest)
    for profile in _same_recipe(results, results.profiles):
        for row in profile["costs"]:
            rule = rules.setdefault(row["rule"], Verdict(row["rule"]))
            rule.memory.setdefault(row["steps"], row["memory"]["batch"])
            if not results.comparisons:  # whose seconds are those of an epoch
                rule.seconds = tuple(row["seconds"][key] for key in ("total", "least", "most"))
    return list(rules.values())


def shared_steps(rules: Sequence[Verdict]) -> int | None:
    """Return the T at which the memory of most rules is known; of several the first, at which they were trained."""
    lengths = [steps for rule in rules for steps in rule.memory]
    return max(lengths, key=lengths.count, default=None)


def _same_recipe(results: Gathered, kind: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the first result of a kind that is of the same recipe, network and batch as the first of all."""
    first = next(iter([*results.comparisons, *results.profiles, *results.agreements]), {})
    return [result for result in kind if all(result.get(k) == first.get(k) for k in ("recipe", "model", "batch"))][:1]


def answers(results: Gathered) -> list[str]:
    """Return a sentence for each rule beside BPTT, or beside the first one, and the rule to take, from full trainings.

    Without these it is the advice on short trainings or on gradients. Where options vary, return the best values
    instead, by the validation samples.
    """
    for comparison in results.comparisons[:1]:
        if any(row.get("varied") for row in comparison["rows"]):
            return [best_of(comparison)]
    rules = verdicts(results)
    reference = next((verdict for verdict in rules if verdict.rule == "BPTT"), rules[0] if rules else None)
    others = [verdict for verdict in rules if verdict is not reference]
    sentences = [_sentence(verdict, reference) for verdict in others if reference is not None]
    if reference is not None and reference.score is not None and sentences:
        sentences.append(_take(rules, reference))
    advice = [row["advice"] for agreement in results.agreements for row in agreement["rows"]]
    return [text for text in sentences if text] or advice


def advice_on(row: Mapping[str, Any], recipe: str, results: Gathered) -> str:
    """Return which rule to take at the τ and T of an agreement: by full trainings of the recipe where there are any."""
    trained = [(None, comparison["steps"]) for comparison in results.comparisons if comparison["recipe"] == recipe]
    answer = answers(results)[-1] if (row["tau"], row["steps"]) in trained else ""
    return answer if answer.startswith("Take ") else row["advice"]


def _take(rules: Sequence[Verdict], reference: Verdict) -> str:
    """Name the rule that needs least memory of those within the margin; say how sure this is, and on what it rests."""
    exact, basis = reference.rule, reference.rests_on()
    apart = f"{basis} are too few to decide." if exact.startswith("BPTT") else f"{NOT_COMPARED}."
    cheaper = sorted((rule for rule in rules if LESS * rule.peak <= reference.peak), key=lambda rule: rule.peak)
    *_, words, enough = zip(*(_judge(verdict, reference) for verdict in cheaper), strict=True) if cheaper else ((), ())
    place = enough.index(True) if True in enough else len(cheaper)
    doubtful = [verdict.rule for verdict, word in zip(cheaper[:place], words, strict=False) if word == UNSURE]
    doubts = f" {UNSURE} of {name_rules(doubtful)}, which would save memory" if doubtful else ""
    if place == len(cheaper):
        bad = f" {name_rules(verdict.rule for verdict in cheaper)}: not safe here, by {basis}." if cheaper else ""
        why = f"{doubts}: {apart}" if doubts else bad or " No other rule here needs less memory."
        delays = DELAYS * bool(bad and not doubts and exact == "BPTT")
        return f"Take {exact}.{why}{SHARED * (reference.fold > 1)}{delays}"
    sure = f"{SAFE} here, by {basis}." if words[place] == SAFE else f"{UNSURE}: {apart}"
    return f"Take {cheaper[place].rule}. {sure}{doubts}{'.' * bool(doubts)}"


def _sentence(verdict: Verdict, reference: Verdict) -> str:
    reached, why, word, _ = _judge(verdict, reference)
    parts = [reached] if reached else []
    of, to = verdict.memory, reference.memory
    both = sorted((steps for steps in of if steps in to), key=lambda steps: steps or 0)[-2:]  # the two largest T
    if saved := [(steps, to[steps] / of[steps]) for steps in both if of[steps]]:
        parts.append(" and ".join(f"{_times(ratio)} memory{f' at T = {t}' if t else ''}" for t, ratio in saved))
    if verdict.seconds and reference.seconds:
        parts.append(f"{_ratio(verdict.seconds, reference.seconds)} × the time")
    if verdict.cosine is not None and not math.isnan(verdict.cosine):
        parts.append(f"gradient agreement {verdict.cosine:.2f}")
    safe = f" {word} here." if word in (SAFE, UNSAFE) else why and f" {UNSURE}: {why}."
    seeds = " One seed: repeat with --seeds 3." if min(len(verdict.scores), len(reference.scores)) == 1 else ""
    died = [rule for rule in (verdict, reference) if rule.died]
    parts += [f"{rule.died} of {rule.died + len(rule.scores)} seeds of {rule.rule} died" for rule in died]
    return f"{verdict.rule}: {', '.join(parts)}.{safe}{seeds}" if parts else ""


def _ratio(seconds: tuple[float, float, float], others: tuple[float, float, float]) -> str:
    """Divide the medians; bound the ratio by the extremes, where there is more than one of each."""
    (middle, least, most), (other, lowest, highest) = seconds, others
    bounds = f" ({least / highest:.2f} – {most / lowest:.2f})" if least < most or lowest < highest else ""
    return f"{middle / other:.2f}{bounds}"


def _judge(verdict: Verdict, reference: Verdict) -> tuple[str, str, str, bool]:
    """Return the comparison as text, why it is not sure, the verdict, and whether the loss is within the margin."""
    failed = verdict.died > 0 and not reference.died
    if verdict.score is None or reference.score is None:
        return "", "", UNSAFE if failed else "", False
    name, other, noise, margin = verdict.metric.replace("_", " "), reference.rule, noise_of(verdict, reference), MARGIN
    lost = round(verdict.sign * (reference.score - verdict.score), 12)  # 0.97 − 0.96 is above 0.01
    if is_share(verdict.metric):
        points, measured = f"{100 * lost:.1f} points", f"±{100 * noise:.0f} points"
        text = f"{name} within {points} of {other}" if lost > 0 else f"{name} not below that of {other}"
        text = f"{name} {points} below {other}" if lost > MARGIN else text
    else:
        margin = MARGIN if verdict.is_share else OF_AN_ERROR * abs(reference.score)
        measured = f"±{score_text(verdict.metric, noise)}"
        reached, beside = (score_text(verdict.metric, score) for score in (verdict.score, reference.score))
        text = f"{name} {reached}, {other} {beside}"
    why = "" if math.isinf(noise) else f"measured to {measured} only, which does not separate it from {other}"
    if exact := other.startswith("BPTT"):
        chance = math.nan if verdict.chance is None else verdict.chance
        gained = max(verdict.sign * (score - chance) for score in (verdict.score, reference.score))
        if guesses := gained <= (0 if math.isinf(noise) else noise):
            why = f"neither beats one answer for all samples, {score_text(verdict.metric, chance)}: train longer"
    else:
        guesses, why = False, NOT_COMPARED
    safe = SAFE if lost <= margin and noise <= 2 * margin and exact and not guesses else UNSURE
    word = UNSAFE if failed or lost > max(margin, noise) else safe
    return text, why, word, lost <= margin and not failed


def _times(ratio: float) -> str:
    return f"{ratio:.1f} × less" if ratio >= LESS else f"{1 / ratio:.1f} × more" if ratio <= 0.95 else "the same"


def noise_of(verdict: Verdict, other: Verdict) -> float:
    """Return twice the standard error of a difference of scores: over seeds, and of shares of the drawn test samples.

    The samples are the same for all seeds, so that more seeds do not help there. Their part is that of two samples of a
    binomial distribution, by Agresti and Coull: 40 right of 40 is not all. Of one seed, the noise is infinite.
    """
    squares = 0.0 if min(len(verdict.scores), len(other.scores)) > 1 else math.inf
    for rule in (verdict, other):
        squares += statistics.variance(rule.scores) / len(rule.scores) if len(rule.scores) > 1 else 0.0
        if rule.samples is not None and rule.is_share:
            share = (statistics.mean(rule.scores) * rule.samples + 2) / (rule.samples + 4)
            squares += max(0.0, share * (1 - share)) / rule.samples
    return 2 * math.sqrt(squares)


def best_of(comparison: Mapping[str, Any]) -> str:
    """Return a sentence on the row best by validation, and whether the next one differs clearly."""
    rows, metric = comparison["rows"], comparison["metric"]
    trained = [(row, reached) for row in rows if row["scores"] and (reached := finite_scores(row["validation"]))]
    if not trained:
        return "Nothing was held out, so that there is no best value: set --data.validation 0.1."
    trained.sort(key=lambda pair: statistics.mean(pair[1]), reverse=comparison["higher_is_better"])
    ranked, scores_of_rows = zip(*trained, strict=True)
    first, means = ranked[0], [statistics.mean(reached) for reached in scores_of_rows]
    text = (
        f"{first['rule']} has the best validation {metric.replace('_', ' ')}: {score_text(metric, means[0])}; "
        f"on the test samples {score_text(metric, statistics.mean(finite_scores(first['scores']) or [math.nan]))}."
    )
    if died := len(first.get("errors", ())):
        text += f" {died} of its seeds died."
    if len(ranked) == 1:
        return text
    text += f" The next is {ranked[1]['rule']}: {score_text(metric, means[1])}"
    if any(len(scores) < 2 for scores in scores_of_rows[:2]):
        return f"{text}. One seed: repeat with --seeds 3."
    sign, samples = 1 if comparison["higher_is_better"] else -1, comparison.get("validation_samples")
    first_two = (Verdict("", list(scores), metric, sign, samples) for scores in scores_of_rows[:2])
    return f"{text}." if abs(means[0] - means[1]) > noise_of(*first_two) else f"{text}, no clear difference."
