"""Is the advice of `sltt agreement` right? What it says beside the accuracy of full trainings, on tasks and on the map.

A rule is enough where it loses no more than one point of test accuracy to BPTT. Where it loses more, but less than
twice the standard error of the difference, the seeds are too few to tell.
"""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cells import Row, accuracies, family, load, markdown, of_task, shown

from sltt.analysis.advice import LEARNS, Trial
from sltt.analysis.agreement import AGREES
from sltt.commands.verdict import MARGIN, Verdict, noise_of

TRIED = (0.3, 0.5, 0.7, 0.8, 0.9, 0.95)  # thresholds, of the cosine and of the share of the loss
WORDS = {0: "right", 1: "not needed", -1: "**wrong**"}  # by the place of the advised rule beside the best


@dataclass(frozen=True)
class Case:
    """A rule on a task or a field of the map."""

    rule: str  # `SLTT()` or `OTTT()`
    worst: float  # the worst cosine, after an epoch
    trial: Trial
    lost: float  # test accuracy of BPTT less that of the rule, after full trainings
    noise: float  # twice its standard error

    @property
    def share(self) -> str:
        """What the rule takes off the loss in the trial, of what BPTT does; the least of the seeds."""
        solved = " (solved)" if self.trial.solves(self.rule) else ""
        return f"{min(self.trial.shares(self.rule)):.0%}{solved}" if self.trial.tells else "too short"

    def by_cosine(self, least: float = AGREES) -> bool:
        """Whether the rule is advised where its worst cosine is at least that."""
        return self.worst >= least

    def by_trial(self, least: float) -> bool:
        """Whether the rule is advised where it learns that share; where the trial does not tell, by the cosine."""
        if not self.trial.tells:
            return self.by_cosine()
        return min(self.trial.shares(self.rule)) >= least or self.trial.solves(self.rule)


def case(found: Row, rule: str, reached: dict[str, list[float]]) -> Case:
    """What `sltt agreement` found, and the test accuracies of full trainings by rule, for each seed."""
    exact, other = (Verdict(name, reached[name]) for name in ("BPTT", rule))
    trial = Trial(*(found["trial"][key] for key in ("epochs", "start", "losses", "accuracies")))
    lost = statistics.mean(reached["BPTT"]) - statistics.mean(reached[rule])
    return Case(f"{rule}()", found["worst_cosine"][f"{rule}()"], trial, lost, noise_of(other, exact))


def advised(row: Row) -> Row:
    """What an agreement with a trial advises, and on which figures."""
    worst = {a["rule"]: a["least"] for a in row["agreement"]}
    return {"advice": row["rule"], "trial": row["trial"], "worst_cosine": worst}


def fields(results: Path) -> list[Case]:
    """List SLTT in the fields of the map that have a trial; one seed does not tell whether it is enough."""
    advice, cells = (load(results, f"paper/{name}") for name in ("advice", "map"))
    found = []
    for name, cell in cells.items():
        reached, said = accuracies(cell["rows"]), advice.get(name.replace("map", "advice"))
        if said and len(reached["SLTT"]) > 1:
            found.append(case(said, "SLTT", reached))
    return found


def of_tasks(results: Path, of_family: str = "") -> dict[str, tuple[str, dict[str, Case]]]:
    """The advice and the rules on the tasks of advice.json: those on time series, or the others."""
    found = {}
    for row in load(results, "advice"):
        if family(row) != of_family:
            continue
        of = of_task(results, row["task"])
        found[row["task"]] = row["advice"], {rule: case(row, rule, of) for rule in ("SLTT", "OTTT") if rule in of}
    return found


def judged(case: Case) -> list[str]:
    """Cells of a table: on what the advice rests, and what the rule loses."""
    return [f"{case.worst:.2f}", case.share, f"{100 * case.lost:+.1f} ± {100 * case.noise:.1f}"]


def verdict(advised: str, cases: Sequence[Case]) -> str:
    """Of the advised rule: right where it is the first that is enough, of the cases or else BPTT."""
    if any(MARGIN < case.lost <= case.noise for case in cases):  # the seeds are too few to tell
        return "open"
    rules = [*(case.rule for case in cases), "BPTT()"]
    best = next((case.rule for case in cases if case.lost <= MARGIN), "BPTT()")
    # where a window or OTTT was not trained, it stands for what is not SLTT
    places = [rules.index(rule) if rule in rules else len(cases) for rule in (advised, best)]
    return WORDS[(places[0] > places[1]) - (places[0] < places[1])]


def calibration(cases: Sequence[Case]) -> list[list[str]]:
    """For each threshold how often a rule is advised rightly: by the cosine, and by the trial."""
    ways = ("worst cosine", Case.by_cosine, AGREES), ("share in the trial", Case.by_trial, LEARNS)
    rows = []
    for name, advises, used in ways:
        for least in TRIED:
            said = [verdict(one.rule if advises(one, least) else "BPTT()", [one]) for one in cases]
            counts = [str(said.count(word)) for word in WORDS.values()]
            mark = " (the command's threshold)" if least == used else ""
            rows.append([f"{name} ≥ {least}{mark}", *counts])
    return rows


def advice(results: Path, of_family: str = "") -> str:
    """What `sltt agreement` says on the tasks, and whether it is right."""
    rows = []
    for task, (said, cases) in of_tasks(results, of_family).items():
        first, *others = cases.values()
        of_traces = judged(others[0])[1:] if others else ["", ""]
        cells = [*judged(first), *of_traces, shown(said), verdict(said, [first, *others])]
        rows.append([task, str(first.trial.epochs), *cells])
    of_sltt, of_ottt = ["worst cosine", "SLTT's share", "SLTT loses, points"], ["OTTT's share", "OTTT loses"]
    return markdown(["task", "epochs", *of_sltt, *of_ottt, "advice", "verdict"], rows)


def calibrated(results: Path) -> str:
    """How often the advice is right, over its thresholds."""
    cases = [case for _, several in of_tasks(results).values() for case in several.values()]
    headings = "the rule is advised if", "right", "BPTT advised without need", "wrong"
    return markdown(headings, calibration([*cases, *fields(results)]))
