import pytest

from sltt.analysis.advice import SHARED
from sltt.commands.results import Gathered, scores_text
from sltt.commands.sections import sections
from sltt.commands.verdict import advice_on, answers, best_of, shared_steps, verdicts

METRIC = {"metric": "accuracy", "higher_is_better": True}


def compared(rule, accuracies, seconds=2.0, memory=20_000_000, cosine=1.0):
    of_seeds = [seconds] * len(accuracies)
    return {
        "rule": rule, "scores": accuracies, "seconds": seconds, "seconds_of_seeds": of_seeds, "peak_memory": memory,
        "cosine": cosine, "operations": None, "validation": [None] * len(accuracies),
    }  # fmt: skip


def gathered(*rows, samples=10_000, **others):
    about = {"recipe": "digits", "steps": 4, "epochs": 6, "samples": samples}
    return Gathered(comparisons=[{**about, "rows": rows, **METRIC}], **others)


def cost(rule, steps, saved):
    memory = {"parameters": 1, "saved": saved, "batch": saved + 10, "total": saved + 11}
    return {"rule": rule, "steps": steps, "memory": memory, "seconds": {"total": 1.0, "least": 1.0, "most": 1.0}}


def profiled(*costs, layers=()):
    return {"recipe": "digits", "costs": costs, "layers": layers}


def test_the_verdict_has_accuracy_memory_at_two_lengths_time_and_agreement():
    costs = [cost(rule, T, saved) for rule, T, saved in (("BPTT", 16, 590), ("SLTT", 16, 90), ("SLTT", 64, 90))]
    found = gathered(
        compared("BPTT", [0.98, 0.98], 2.0, 21), compared("SLTT", [0.976, 0.976], 1.0, 10), profiles=[profiled(*costs)]
    )
    assert answers(found) == [
        "SLTT: accuracy within 0.4 points of BPTT, 2.1 × less memory at T = 4 and 6.0 × less memory at T = 16, "
        "0.50 × the time, gradient agreement 1.00. Safe here.",
        "Take SLTT. Safe here, by 2 seeds of 6 epochs and 10,000 test samples.",
    ]


@pytest.mark.parametrize(
    ("sltt_", "ottt", "samples", "said"),
    [
        (0.98, 0.98, 10_000, "SLTT. Safe here, by 2 seeds of 6 epochs and 10,000 test samples."),
        (0.90, 0.98, 10_000, "OTTT. Safe here, by 2 seeds of 6 epochs and 10,000 test samples."),
        (0.98, 0.98, 300, "SLTT. Not sure: 2 seeds of 6 epochs and 300 test samples are too few to decide."),
        (0.96, 0.98, 300, "test samples are too few to decide. Not sure of SLTT, which would save memory."),
        (0.40, 0.60, 300, "not safe here, by 2 seeds of 6 epochs and 300 test samples. Before BPTT, where the input"),
        (0.40, 0.96, 300, "BPTT. Not sure of OTTT, which would save memory: 2 seeds of 6 epochs and 300 test"),
        (1.00, 1.00, 40, "SLTT. Not sure: 2 seeds of 6 epochs and 40 test samples are too few to decide."),
    ],
)
def test_the_rule_to_take_needs_least_memory_of_those_within_a_point(sltt_, ottt, samples, said):
    scores = {"SLTT": sltt_, "OTTT": ottt, "BPTT": 0.98}
    rows = [compared(rule, [score] * 2, memory=i + 1) for i, (rule, score) in enumerate(scores.items())]
    assert said in answers(gathered(*rows, samples=samples))[-1]
    folded = [row | {"peak_memory": 29 + row["peak_memory"] // 3, "fold": 4} for row in rows]  # within 5% is the same
    last = answers(gathered(*folded, samples=samples))[-1]
    assert last == f"Take BPTT. No other rule here needs less memory.{SHARED}"
    alone = answers(gathered(rows[-1], compared("TBPTT", [ottt] * 2, memory=40), samples=samples))[-1]
    assert alone == "Take BPTT. No other rule here needs less memory."


def test_seconds_of_an_epoch_are_not_compared_with_those_of_a_batch():
    """BPTT was profiled, and not trained."""
    found = gathered(compared("SLTT", [0.98], 2.0, 10), profiles=[profiled(cost("BPTT", 4, 90), cost("SLTT", 4, 90))])
    assert {one.rule: one.seconds for one in verdicts(found)} == {"SLTT": (2.0, 2.0, 2.0), "BPTT": None}
    assert "the time" not in " ".join(answers(found))


@pytest.mark.parametrize(
    ("accuracies", "samples", "said"),
    [
        ([0.99, 0.99], 10_000, "accuracy not below that of BPTT"),
        ([0.86, 0.86], 10_000, "accuracy 12.0 points below BPTT"),
        ([0.90, 0.90], 50, "Not sure: measured to ±11 points only, which does not separate it from BPTT."),
        ([0.98, 0.98], 50, "Not sure: measured to ±9 points only, which"),
        ([0.90, 0.90], 100_000, "Not safe here."),
        ([0.90], 100_000, "gradient agreement 1.00. One seed: repeat with --seeds 3."),
        ([0.80, 1.00], 100_000, "Not sure: measured to ±20 points only, which"),
    ],
)
def test_a_loss_of_accuracy_is_told_from_noise(accuracies, samples, said):
    found = gathered(
        compared("BPTT", [0.98] * len(accuracies), memory=21), compared("SLTT", accuracies, memory=20), samples=samples
    )
    assert said in answers(found)[0]


def test_a_rule_that_died_has_no_verdict_and_without_bptt_the_first_is_the_reference():
    found = gathered(compared("SLTT", [0.9, 0.9]), compared("OTTT", []), compared("SLTT:k=1", [0.9, 0.9], 1.0))
    assert [one.rule for one in verdicts(found)] == ["SLTT", "SLTT:k=1"]
    assert answers(found)[0].startswith("SLTT:k=1: accuracy not below that of SLTT, the same memory at T = 4")


@pytest.mark.parametrize(("chance", "exact"), [(0.1, "BPTT"), (None, "SLTT")])
def test_what_learned_nothing_or_has_no_exact_reference_is_not_called_safe(chance, exact):
    found = gathered(compared(exact, [0.097, 0.103], memory=40), compared("SLTT:k=1", [0.103, 0.097], memory=20))
    found.comparisons[0]["chance"] = chance
    first, take = answers(found)
    assert (
        "neither beats one answer for all samples, 10.00%" in first
        if chance
        else "BPTT, which is exact, was not compared" in first
    )
    assert take.startswith("Take SLTT:k=1. Not sure: ")


def test_costs_of_another_network_are_not_those_of_the_comparison():
    found = gathered(compared("BPTT", [0.9]), compared("SLTT", [0.9]), profiles=[{**profiled(), "batch": 32}])
    found.profiles[0]["costs"] = [cost("SLTT", 64, 5), cost("BPTT", 64, 500)]
    assert "T = 64" not in answers(found)[0]


def test_a_rule_whose_seeds_died_is_not_safe():
    died = {"errors": ["seed 1: the loss is nan", "seed 2: the loss is nan"]}
    found = gathered(
        compared("BPTT", [0.9, 0.9, 0.9]),
        compared("SLTT", [0.95]) | died,
        compared("OTTT", [], memory=0) | died,
        compared("TBPTT", [0.93, None, 0.94]),
    )
    sltt_, ottt, tbptt, take = answers(found)
    assert "2 of 3 seeds of SLTT died. Not safe here. One seed" in sltt_
    assert ottt == "OTTT: gradient agreement 1.00, 2 of 2 seeds of OTTT died. Not safe here."
    assert "1 of 3 seeds of TBPTT died. Not safe here." in tbptt
    assert take == "Take BPTT. No other rule here needs less memory."
    rows = [{**row, "validation": row["scores"]} for row in found.comparisons[0]["rows"]]
    assert "2 of its seeds died." in best_of({"rows": rows[1:3], **METRIC})


def test_the_reference_may_have_no_memory_that_was_measured():
    found = gathered(compared("BPTT", [0.9, 0.9], memory=0), compared("SLTT", [0.9, 0.9]))
    said = "SLTT: accuracy not below that of BPTT, 1.00 × the time, gradient agreement 1.00. Safe here."
    assert answers(found) == [said, "Take SLTT. Safe here, by 2 seeds of 6 epochs and 10,000 test samples."]


def test_without_trainings_the_advice_or_the_costs_answer():
    agreements = [{"recipe": "digits", "rows": [{"advice": "Take SLTT()."}]}]
    assert answers(Gathered(agreements=agreements)) == ["Take SLTT()."]
    (text,) = answers(Gathered(profiles=[profiled(cost("BPTT", 4, 90), cost("SLTT", 4, 40))]))
    assert text == "SLTT: 2.0 × less memory at T = 4, 1.00 × the time."


def test_the_verdict_of_an_error_needs_several_seeds():
    def said(*rows):
        found = gathered(*(compared(rule, scores) for rule, scores in rows))
        found.comparisons[0] |= {"metric": "mean_squared_error", "higher_is_better": False}
        return answers(found)[0]

    assert "mean squared error 0.2, BPTT 0.1" in said(("BPTT", [0.1]), ("SLTT", [0.2]))
    assert "afe here" not in said(("BPTT", [0.1]), ("SLTT", [0.2]))
    assert "Not safe here." in said(("BPTT", [0.1, 0.1]), ("SLTT", [0.2, 0.2]))
    assert "Safe here." in said(("BPTT", [0.1, 0.1]), ("SLTT", [0.05, 0.05]))
    assert "Safe here." in said(("BPTT", [0.1, 0.10001]), ("SLTT", [0.10003, 0.10004]))
    assert "Not sure: measured to ±0.4001 only, which" in said(("BPTT", [0.1, 0.11]), ("SLTT", [0.1, 0.5]))
    found = gathered(compared("BPTT", [0.1, 0.1]), compared("SLTT", [0.1, 0.1]))
    found.comparisons[0] |= {"metric": "mean_squared_error", "higher_is_better": False, "chance": 0.1}
    assert "Not sure: neither beats one answer for all samples, 0.1: train longer." in answers(found)[0]
    assert "Not sure: measured to ±0.08 only, which" in said(("BPTT", [0.1, 0.1]), ("SLTT", [0.05, 0.13]))


def test_a_score_between_0_and_1_is_judged_as_an_accuracy():
    found = gathered(compared("BPTT", [0.95, 0.95]), compared("SLTT", [0.93, 0.93]), samples=400)
    found.comparisons[0] |= {"metric": "auroc"}
    assert "auroc 0.93, BPTT 0.95" in answers(found)[0]
    assert "Not sure: measured to ±0.03" in answers(found)[0]


def test_where_bptt_died_too_there_is_no_verdict():
    found = gathered(*({**compared(rule, []), "errors": ["no crop"]} for rule in ("BPTT", "SLTT")))
    assert "1 of 1 seeds of SLTT died" in answers(found)[0]
    assert "afe here" not in " ".join(answers(found))
    both = gathered(compared("BPTT", [0.98, 0.98, None], memory=9), compared("SLTT", [0.97, 0.97, None], memory=3))
    assert ["Safe here" in text for text in answers(both)] == [True, True]


def test_scores_that_are_no_numbers_are_left_out():
    nan = float("nan")
    assert scores_text([0.5, nan, None, 0.7]) == "60.0% ± 14.1%"
    assert scores_text([nan]) == "–"
    found = gathered(compared("BPTT", [0.9, 0.9]), compared("SLTT", [nan, 0.8]), compared("OTTT", [nan, None]))
    kept = [(one.rule, one.scores, one.died) for one in verdicts(found)]
    assert kept == [("BPTT", [0.9, 0.9], 0), ("SLTT", [0.8], 1), ("OTTT", [], 2)]
    rows = [{"rule": "a", "scores": [nan, 0.5], "validation": [nan, 0.4]}]
    rows += [{"rule": "b", "scores": [0.7], "validation": [0.6]}]
    best = best_of({"rows": rows, **METRIC})
    assert best.startswith("b has the best validation accuracy: 60.00%; on the test samples 70.00%. The next is a: 40")
    assert best_of({"rows": [rows[0] | {"validation": [nan]}], **METRIC}).startswith("Nothing was held out")


def test_a_ratio_of_times_has_its_bounds_and_memory_is_of_one_t():
    slow = compared("BPTT", [0.98] * 2, memory=100) | {"seconds_of_seeds": [1.6, 2.4]}
    fast = compared("SLTT", [0.98] * 2, 1.0, 50) | {"seconds_of_seeds": [0.9, 1.2]}
    found = gathered(
        slow, fast, profiles=[profiled(*(cost(rule, T, 90) for rule in ("BPTT", "SLTT") for T in (1, 16)))]
    )
    assert "0.50 (0.38 – 0.75) × the time" in answers(found)[0]
    assert shared_steps(verdicts(found)) == 4


def test_a_report_has_one_verdict_of_a_rule():
    columns = [{"rule": "SLTT()", "cosine": 0.9, "least": 0.9, "norm_ratio": 1.0, "dropped": 0.1}]
    columns[0]["layers"] = {"a": (0.9, 1.0)}
    rows = [{"tau": None, "steps": 4, "epochs": 0, "advice": "Take OTTT(). Not sure.", "agreement": columns}]
    gradients = {"agreements": [{"recipe": "digits", "rows": rows}]}

    def text(found):
        return " ".join(paragraph for section in sections(found) for paragraph in section.text)

    made = gathered(compared("BPTT", [0.98] * 3), compared("SLTT", [0.98] * 3, memory=9), **gradients)
    assert (
        advice_on(rows[0], "digits", made)
        == answers(made)[-1]
        == "Take SLTT. Safe here, by 3 seeds of 6 epochs and 10,000 test samples."
    )
    for other in (
        advice_on(rows[0] | {"tau": 5.0}, "digits", made),
        advice_on(rows[0], "digits", Gathered(**gradients)),
    ):
        assert other == "Take OTTT(). Not sure."
    trained = text(gathered(compared("BPTT", [0.98] * 3), compared("SLTT", [0.98] * 3), **gradients))
    assert "Safe here." in trained
    assert "Not sure" not in trained
    assert "Take OTTT" not in trained
    assert "Not sure" in text(Gathered(**gradients))
