import json
import math
import shutil
import types
from dataclasses import replace
from functools import partial
from itertools import pairwise

import pytest
import torch
import yaml
from rich.table import Table
from torch import nn

import sltt
from sltt.analysis import count_operations
from sltt.commands import compare, main, vary
from sltt.commands.parsing import Recipe
from sltt.commands.rule_texts import rule_options, rules
from sltt.commands.verdict import best_of
from sltt.training.console import Console, as_json
from tests.conftest import LOSS
from tests.data.recordings import nmnist


@pytest.mark.parametrize(("steps", "k"), [(4, None), (1, 1), (6, 3)])
def test_multiplications_are_those_of_the_closed_form(steps, k):
    sizes, batch = [6, 8, 7, 3], 5
    first, second, last = (nn.Linear(n, m) for n, m in pairwise(sizes))
    model = nn.Sequential(first, sltt.LIF(), second, sltt.LIF(), last)
    x, y = torch.randn(steps, batch, 6), torch.randint(3, (batch,))
    products = [n * m for n, m in pairwise(sizes)]
    found = count_operations(model, x, y, LOSS, sltt.SLTT(k=k, fold=1))
    assert found.forward == steps * batch * sum(products)
    assert found.backward == (k or steps) * batch * (2 * sum(products) - products[0])  # the input needs no gradient
    if k is None:
        assert count_operations(model, x, y, LOSS, sltt.BPTT()) == found  # its temporal path is elementwise


def test_what_is_recomputed_counts_to_the_backward():
    model = nn.Sequential(nn.Linear(8, 2048), sltt.LIF(), nn.Linear(2048, 512), nn.BatchNorm1d(512), sltt.LIF(),
                          nn.Linear(512, 3))  # fmt: skip
    x, y = torch.randn(2, 8, 8), torch.randint(3, (8,))
    plain, again = (count_operations(model, x, y, LOSS, sltt.SLTT(recompute=r)) for r in (False, True))
    assert plain.forward == again.forward
    assert again.backward - plain.backward == 2 * 8 * 2048 * 512


@pytest.mark.parametrize(
    ("text", "options"),
    [
        ("BPTT", ["--rule", "BPTT"]),
        ("Mixed:windows={a.*: all, b: 4}", ["--rule", "Mixed", "--rule.windows", "{a.*: all, b: 4}"]),
        ("SLTT:k=2:rescale=true", ["--rule", "SLTT", "--rule.k", "2", "--rule.rescale", "true"]),
    ],
)
def test_rules_are_written_with_their_settings(text, options):
    assert rule_options(text) == options
    assert rules(f"OTTT,{text},SLTT") == ["OTTT", text, "SLTT"]


@pytest.mark.parametrize("text", ["", "SLTT:k", ":k=1"])
def test_a_rule_that_is_not_understood_is_named(text):
    with pytest.raises(ValueError, match="expected a rule such as BPTT, SLTT:k=1"):
        rule_options(text)


WORDS = ["compare", "digits", "--epochs", "1", "--model.width", "4", "--steps", "3", "--device", "cpu"]


@pytest.mark.slow
def test_the_command_compares_continues_and_outlives_a_run_that_dies(capsys, here, monkeypatch):
    monkeypatch.setattr(sltt.OTTT, "run", lambda *_: 1 / 0)
    words = [*WORDS, "--rules", "BPTT,OTTT,SLTT:k=1", "--seeds", "2"]
    assert main(words) == 1
    captured = capsys.readouterr()
    assert "2 runs died; the same command tries them again: OTTT, seed 0: division by zero" in captured.err
    table = captured.out[captured.out.index("rule  ") :].splitlines()
    assert [line.split()[0] for line in table[1:4]] == ["BPTT", "OTTT", "SLTT:k=1"]
    assert all(len(line) <= 80 for line in table[:4])
    (folder,) = here.glob("runs/compare-digits-*")
    rows = json.loads((folder / "compare.json").read_text())["rows"]
    assert [len(row["scores"]) for row in rows] == [2, 0, 2]
    assert rows[0]["cosine"] == pytest.approx(1, abs=1e-4)
    assert rows[0]["peak_memory"] > rows[2]["peak_memory"] > 0
    assert rows[0]["operations"]["backward"] == 3 * rows[2]["operations"]["backward"]
    assert [rows[i]["energy"] and len(rows[i]["energy"]["ratios"]) for i in range(3)] == [4, None, 4]

    # what is trained is measured again, and not trained again
    monkeypatch.setattr("sltt.training.batch_loop.BatchLoop._train", lambda *_: pytest.fail("trained again"))
    assert main([*WORDS, "--rules", "SLTT:k=1", "--seeds", "2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["rows"][0]["scores"] == rows[2]["scores"]


@pytest.mark.parametrize("command", ["compare", "profile"])
def test_a_k_of_more_steps_than_there_are_is_told_before_anything_runs(command, capsys, here):
    assert main([command, *WORDS[1:], "--rules", "BPTT,SLTT:k=5"]) == 1
    captured = capsys.readouterr()
    assert "SLTT(k=5) trains 5 steps, but the sequence has T = 3" in captured.err
    assert (captured.out, [*here.iterdir()]) == ("", [])


def test_each_row_trains_its_rule_in_all_phases_and_is_measured_as_it_trains(capsys, here, monkeypatch):
    seen, dtypes = [], set()

    def train(session, training):
        seen.append([str(phase.rule or training.rule) for phase in training.phases])
        history = [{"seconds": 1.0, "validation_accuracy": 0.5}]
        return types.SimpleNamespace(history=history, epoch=1, run=training.run, steps=2)

    def measure_split(session, training, split):
        seen.append(session.settings)
        assert training.steps == 2  # of the phase whose weights these are
        training.model.features[0].register_forward_hook(
            lambda module, x, out: dtypes.add((out.dtype, x[0].is_contiguous(memory_format=torch.channels_last)))
        )
        return types.SimpleNamespace(score=1.0)

    monkeypatch.setattr(compare, "train", train)
    monkeypatch.setattr(compare, "measure_split", measure_split)
    phases = "[{epochs: 1, rule: {class_path: sltt.RateBased}}, {epochs: 1}]"
    words = [*WORDS, "--phases", phases, "--precision", "bf16-mixed", "--channels_last", "true", "--compile", "off"]
    assert main([*words, "--rules", "SLTT:k=1", "--json"]) == 0
    assert seen[0] == ["SLTT(k=1)", "SLTT(k=1)"]
    assert (seen[1].channels_last, seen[1].precision, seen[1].compile) == (True, "bf16-mixed", "off")
    assert dtypes == {(torch.bfloat16, True)}
    found = json.loads(capsys.readouterr().out)
    (row,) = found["rows"]
    assert 0 < row["cosine"] < 1
    assert row["steps"] == found["steps"] == 2


@pytest.mark.slow
def test_a_training_counts_where_its_gradient_cannot_be_compared(capsys, here, monkeypatch):
    """BPTT, for the cosine, may need more memory than there is."""

    def out_of_memory(*args, **kwargs):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(compare, "agreement", out_of_memory)
    assert main([*WORDS, "--rules", "SLTT", "--batch_size", "512", "--save", "a"]) == 0
    assert "SLTT: not all is measured: out of memory" in " ".join("".join(capsys.readouterr()).split())
    (row,) = json.loads((here / "a" / "compare.json").read_text())["rows"]
    assert (len(row["scores"]), row["errors"], row["cosine"]) == (1, [], None)
    assert row["peak_memory"] > 0


@pytest.mark.parametrize(("rule", "options"), [("SLTT:k=2", []), ("BPTT", []), ("SLTT", ["--rule.hoist", "true"])])
def test_a_rule_has_no_settings_of_the_recipes_rule(rule, options):
    recipe = Recipe("sltt compare", "cifar10-small", ["--model.widths", "[2, 2, 2]", *options])
    assert repr(recipe.build().rule) == "SLTT(k=1, rescale=True, hoist=True)"
    expected = {"SLTT": sltt.SLTT, "SLTT:k=2": partial(sltt.SLTT, k=2), "BPTT": sltt.BPTT}[rule](hoist=bool(options))
    assert repr(recipe.build(rule=rule).rule) == repr(expected)
    assert recipe.resolve(rule=rule)["rule"]["init_args"].get("k") == (2 if rule == "SLTT:k=2" else None)


ERROR = ["--metric", "tests.commands.tiny.Wrong"]


@pytest.mark.slow
def test_another_metric_is_compared_and_reported(capsys, here, monkeypatch):
    assert main([*WORDS, *ERROR, "--rules", "BPTT,SLTT", "--seeds", "2", "--save", "a"]) == 0
    assert "wrong" in capsys.readouterr().out
    found = json.loads((here / "a" / "compare.json").read_text())
    assert (found["metric"], found["higher_is_better"]) == ("wrong", False)
    assert all(0 < score < 1 for row in found["rows"] for score in row["scores"])
    pytest.importorskip("matplotlib", reason="the report needs matplotlib")
    assert main(["report", "a"]) == 0
    page = (here / "a" / "report" / "report.html").read_text()
    assert "test wrong" in page
    assert "SLTT: wrong 0." in page


SWEEP = ["--vary", "model.neuron.tau=1.1,4", "--vary", "rule.k=1,null", "--save", "a"]


@pytest.mark.slow
def test_values_of_options_are_compared_continued_and_the_best_is_told_by_validation(capsys, here, monkeypatch):
    assert main([*WORDS, *SWEEP]) == 0
    out = capsys.readouterr().out
    assert all(len(line) <= 80 for line in out[out.index("validation") :].splitlines()[:5])
    found = json.loads((here / "a" / "compare.json").read_text())
    rows = found["rows"]
    assert [tuple(row["varied"].values()) for row in rows] == [("1.1", "1"), ("1.1", "null"), ("4", "1"), ("4", "null")]
    best = max(rows, key=lambda row: row["validation"][0])
    told = ", ".join(["SLTT", *(f"{name}={value}" for name, value in best["varied"].items())]) + " has the best"
    assert told in " ".join(out.split())
    configs = [yaml.safe_load((here / "a" / row["runs"][0] / "config.yaml").read_text()) for row in rows]
    assert [config["model"]["init_args"]["neuron"]["init_args"]["tau"] for config in configs] == [1.1, 1.1, 4.0, 4.0]
    assert [config["rule"]["init_args"].get("k") for config in configs] == [1, None, 1, None]
    with monkeypatch.context() as patch:
        patch.setattr("sltt.training.runs.new_run", None)  # trained before
        assert main([*WORDS, *SWEEP]) == 0
    again = json.loads((here / "a" / "compare.json").read_text())["rows"]
    assert [row["scores"] for row in again] == [row["scores"] for row in rows]
    pytest.importorskip("matplotlib", reason="the report needs matplotlib")
    assert main(["report", "a"]) == 0
    page = (here / "a" / "report" / "report.html").read_text()
    assert "Values compared on digits" in page
    assert told in page
    assert "validation accuracy" in page


def test_runs_of_different_values_have_different_folders():
    labels = [f"SLTT, lr={value}" for value in ("-0.5", "0.5", "1e-3", "1e+3", "-.5")]
    assert len({compare._file_name(label) for label in labels}) == len(labels)
    assert compare._file_name("SLTT:k=1, model.neuron.tau=2") == "SLTT-k-1-model.neuron.tau-2"


@pytest.mark.slow
def test_a_folder_with_runs_of_other_settings_is_refused(capsys, here, monkeypatch):
    words = [*WORDS, "--rules", "SLTT:k=1", "--save", "kept"]
    assert main(words) == 0
    before = (here / "kept" / "compare.json").read_bytes()
    of_optimizer = "optimizer.init_args.lr was 0.005 and is 0.5"
    of_data = "data.init_args.validation was 0.1 and is 0.2"
    for other, names in (("epochs=2", "epochs"), ("data.validation=0.2", of_data), ("optimizer.lr=0.5", of_optimizer)):
        assert main([*words, f"--{other}"]) == 1
        assert f"was trained with other settings ({names}): choose another --save" in capsys.readouterr().err
    assert (here / "kept" / "compare.json").read_bytes() == before
    assert yaml.safe_load((here / "kept" / "SLTT-k-1-seed0" / "config.yaml").read_text())["epochs"] == 1


def test_data_without_test_samples_is_refused_before_a_training(capsys, here, monkeypatch):
    nmnist(here)
    shutil.rmtree(here / "NMNIST" / "Test")
    assert main(["compare", "nmnist", "--data.root", str(here), "--device", "cpu", "--save", "kept"]) == 1
    assert "has no test samples, on which rules are compared: choose other data" in capsys.readouterr().err
    assert not (here / "kept").exists()


@pytest.mark.slow
def test_a_rule_that_updates_at_every_step_is_compared(capsys, here, monkeypatch):
    assert main([*WORDS, "--rules", "OTTT:online=true", "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)["rows"]
    assert len(row["scores"]) == 1
    assert row["cosine"] > 0.5
    assert row["operations"]["backward"] > 0


def test_commas_within_brackets_are_no_separators():
    assert vary.values("phases=[{epochs: 1, steps: 2}],null") == ("phases", ["[{epochs: 1, steps: 2}]", "null"])


def swept(*rows, samples=None):
    rows = [{"rule": name, "scores": [0.5] * len(found), "validation": found} for name, found in rows]
    about = {"metric": "accuracy", "higher_is_better": True, "validation_samples": samples}
    return best_of({"rows": rows, **about})


def test_the_best_value_is_told_from_the_next_or_not():
    assert "b has the best validation accuracy: 90.00%" in swept(("a", [0.7, 0.7]), ("b", [0.9, 0.9]))
    assert "The next is a: 70.00%." in swept(("a", [0.7, 0.7]), ("b", [0.9, 0.9]))
    assert "no clear difference" in swept(("a", [0.7, 0.9]), ("b", [0.75, 0.95]))
    assert "One seed" in swept(("a", [0.7]), ("b", [0.9]))
    assert "Nothing was held out" in swept(("a", [None]), ("b", [None]))
    assert "no clear difference" in swept(("a", [0.7, 0.7]), ("b", [0.8, 0.8]), samples=40)
    assert "no clear" not in swept(("a", [0.7, 0.7]), ("b", [0.8, 0.8]), samples=4000)


def test_numbers_that_are_not_finite_are_null_in_json():
    found = as_json({"cosine": math.nan, "layers": {"a": (math.inf, 0.5)}, "steps": 4, "rule": None})
    expected = {"cosine": None, "layers": {"a": [None, 0.5]}, "steps": 4, "rule": None}
    assert json.loads(found, parse_constant=pytest.fail) == expected


def test_the_brackets_of_a_rule_are_shown(capsys):
    table = Table("rule")
    table.add_row("Mixed:windows={[12]: all}")
    Console().console.print(table)
    assert "Mixed:windows={[12]: all}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("metric", "targets", "chance"),
    [
        (sltt.metrics.Accuracy(), [0, 1, 1, 1], 0.75),
        (sltt.metrics.Accuracy(), [[0, 1], [1, 1], [1, -100], [1, 0]], 5 / 7),
        (sltt.metrics.MeanAbsoluteError(), [0.0, 1.0, 1.0, 4.0], 1.25),
        (sltt.metrics.MeanSquaredError(), [[0.0], [1.0], [1.0], [4.0]], 2.25),
        (nn.L1Loss(), [0.0, 1.0, 1.0, 4.0], None),
    ],
)
def test_chance_is_the_score_of_one_answer_for_all_test_samples(metric, targets, chance):
    samples = torch.utils.data.TensorDataset(torch.rand(4, 3), torch.tensor(targets))
    if chance != 0.75:  # with targets that are found one by one, without an end that is told
        samples = type("Endless", (), {"__len__": lambda _: 4, "__getitem__": lambda _, i, all=samples: all[i % 4]})()
    splits = sltt.data.from_datasets(samples, test=samples, static=True, classes=2).splits(4)
    assert compare._chance(splits, metric) == chance
    ragged = replace(splits, test=[(torch.rand(3), torch.rand(n)) for n in (2, 3)])
    assert isinstance(metric, sltt.metrics.Accuracy) or compare._chance(ragged, metric) is None
