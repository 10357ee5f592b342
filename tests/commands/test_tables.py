"""Tables of what commands found: the same rows in the terminal, on the page and as CSV."""

import math
import sys

from sltt.commands.agreement import agreement_table, print_agreement
from sltt.commands.compare import print_compared
from sltt.commands.fscil import SCORES, print_few_shots
from sltt.commands.profile import fits_table, print_profile
from sltt.commands.tables import Cell, Table, numeral
from sltt.training.console import Console
from tests.commands.tiny import run


def shown(table):
    return [[cell.text for cell in row] for row in table.rows]


def test_cells_that_are_not_there_are_empty_and_columns_come_in_order(capsys):
    table = Table([{"rule": "A", "T": Cell("died", "")}, {"rule": "BC", "T": numeral(4), "loss": numeral(0.5, ".2f")}])
    assert table.headings == ["rule", "T", "loss"]
    assert shown(table) == [["A", "died", ""], ["BC", "4", "0.50"]]
    assert [table.kind(column) for column in range(3)] == ["text", "number", "number"]
    assert table.csv().splitlines() == ["rule,T,loss", "A,,", "BC,4,0.5"]
    table.show(Console())
    assert capsys.readouterr().out.splitlines() == ["rule     T  loss", "A     died      ", "BC       4  0.50"]


COMPARED = {
    "rule": "SLTT", "varied": {}, "scores": [0.5], "validation": [None], "seconds": 2.0, "seconds_of_seeds": [2.0],
    "peak_memory": 5_200_000,
    "operations": {"forward": 100, "backward": 200}, "cosine": math.nan, "errors": [],
}  # fmt: skip
METRIC = {"metric": "accuracy", "higher_is_better": True}


def test_a_rule_that_trained_and_could_not_be_measured_has_a_row(capsys):
    rows = [COMPARED, {**COMPARED, "rule": "OTTT", "operations": None}]
    print_compared({**METRIC, "rows": rows}, Console())
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["rule", "accuracy", "s/epoch", "memory", *["mult.", "fwd", "mult.", "bwd"], "cosine"]
    assert lines[3].startswith("OTTT: accuracy not below that of SLTT")
    assert [line.split() for line in lines[1:3]] == [
        ["SLTT", "50.0%", "2.00", "5.2", "MB", "1.00e+02", "2.00e+02", "nan"],
        ["OTTT", "50.0%", "2.00", "–", "–", "–", "nan"],
    ]


def test_gradients_beside_that_of_bptt(capsys):
    one = {"rule": "SLTT()", "cosine": 0.98765, "least": 0.9, "norm_ratio": 0.5, "dropped": 0.035}
    one["layers"] = {"a": (0.9, 0.8)}
    rows = [{"tau": tau, "steps": 3, "epochs": 1, "advice": "Take it.", "agreement": [one]} for tau in (None, 1.5)]
    table = agreement_table(rows)
    assert shown(table)[0] == ["recipe's", "3", "1", "SLTT()", "0.9877", "0.9000", "0.500", "3.5%"]
    assert [row[0].text for row in table.rows] == ["recipe's", "1.5"]
    one["layers"] |= {"b": (math.nan, math.nan), "c": (None, None), "d": (-0.5, 1.0)}
    print_agreement(rows, Console())
    lines = capsys.readouterr().out.splitlines()
    assert [line.split() for line in lines[5:7]] == [["layer", "cosine", "norm", "/", "BPTT"], ["a", "0.9000", "0.800"]]
    assert [line.split()[0] for line in lines[6:8]] == ["a", "d"]
    assert lines[8:] == ["T = 3, after 1 epoch: Take it.", "τ = 1.5, T = 3, after 1 epoch: Take it."]


def test_accuracy_by_session_is_a_mean_over_seeds(capsys):
    trained = {"rule": "SLTT", "accuracies": [[0.5, 0.25], [0.7, 0.35]], **{key: [0.5, 0.7] for key in SCORES}}
    died = {"rule": "OTTT", "accuracies": [], **{key: [] for key in SCORES}}
    print_few_shots({"sizes": [6, 2], "shot": 5, "rows": [died, trained]}, Console())
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "6 base classes, 1 × 2 new ones of 5 samples"
    assert [line.split() for line in lines[2:]] == [
        ["rule", *SCORES.values()],
        ["OTTT", "died"],
        ["SLTT", *["60.0", "±", "14.1"] * 5],
        ["classes", "seen", "6", "8"],
        ["SLTT", "60.0", "30.0"],
    ]


def test_what_fits_and_what_was_not_run():
    fits = {"rule": "SLTT", "budget": 10**6, "batch": 1200, "steps": None, "predicted": 990_000, "measured": None}
    checked = {**fits, "measured": 1_000_000}
    assert shown(fits_table([fits, checked])) == [
        ["SLTT", "1,200", "no limit", "0.99 MB", "not run", ""],
        ["SLTT", "1,200", "no limit", "0.99 MB", "1 MB", "-1.0%"],
    ]


def test_a_profile_names_the_t_of_its_layers_and_the_paths(capsys):
    memory = dict.fromkeys(
        ("parameters", "gradients", "optimizer", "input", "states", "saved", "rest", "batch", "total"), 10_000
    )
    seconds = dict.fromkeys(("data", "forward", "backward", "step", "total"), 0.25)
    cost = {"rule": "SLTT", "memory": memory, "seconds": seconds, "operations": {"forward": 1, "backward": 2}}
    cost["fold"] = {"trained": 1, "forward": 1, "why": "has hooks on 0 (Linear)"}
    neurons = {"name": "1", "operations": None, "firing_rate": 0.125, "spikes": 1234.0}
    linear = {"name": "0", "dense": 16_000, "effective_macs": 16_000, "macs": 16_000}
    path = {"name": "0", "density": 0.5, "calls": 4, "sparse_forward": 1, "sparse_gradient": 4}
    found = {
        "device": "cpu", "batch": 8, "trained": False, "costs": [{**cost, "steps": 16}, {**cost, "steps": 4}],
        "layers": [{"name": "0", "operations": linear, "firing_rate": None, "spikes": None}, neurons],
        "paths": [path], "fits": [],
        "own_code": ["1 (Alpha) has other dynamics than Leaky"],
        "energy": {"energy": [{"of one sample": "Dense", "SNN": 1234.5, "ANN": None}], "ratios": []},
    }  # fmt: skip
    print_profile(found, Console())
    out = capsys.readouterr().out
    assert "one sample, T = 16, untrained" in out  # the largest, whatever the order
    rows = [line.split() for line in out.splitlines()]
    assert ["SLTT", "16", *["0.01"] * 9] in rows
    assert ["SLTT", "4", *["0.250"] * 5, "1.00e+00", "2.00e+00", "1"] in rows
    assert "SLTT, T = 4: one time step in a call, since the network has hooks on 0 (Linear)" in out
    assert "not in our kernels: 1 (Alpha) has other dynamics than Leaky" in out
    assert ["0", "16,000", "100.0%", "16,000", "MAC", "73.6"] in rows
    assert ["1", "0.125", "1,234"] in rows
    assert "sparse in 1 of 4" in " ".join(out.split())
    assert ["Dense", "1,234", "–"] in rows


def test_a_report_without_its_packages_says_what_to_install(here, capsys, monkeypatch):
    (here / "a").mkdir()
    (here / "a" / "fscil.json").write_text("{}")
    for name in {"matplotlib", *(one for one in sys.modules if one.startswith("matplotlib."))}:
        monkeypatch.setitem(sys.modules, name, None)
    for name in ("sections", "page", "figures"):
        monkeypatch.delitem(sys.modules, f"sltt.commands.{name}", raising=False)
    code, _, err = run(capsys, "report", "a")
    assert code == 1
    assert err.startswith("sltt: the report needs matplotlib")
    assert "pip install 'sltt[report]'" in err
