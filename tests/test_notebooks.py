import json
import re
from pathlib import Path

import pytest

import sltt

NOTEBOOKS = Path(sltt.__file__).parents[1] / "docs" / "notebooks"


def cells(name, kind):
    content = json.loads((NOTEBOOKS / f"{name}.ipynb").read_text())
    return [cell for cell in content["cells"] if cell["cell_type"] == kind]


def run(name, monkeypatch, tmp_path, epochs):
    """The variables of a notebook after its cells ran in order, with fewer epochs."""
    pyplot = pytest.importorskip("matplotlib.pyplot")
    pyplot.switch_backend("agg")
    monkeypatch.chdir(tmp_path)
    code = "\n\n".join("".join(cell["source"]) for cell in cells(name, "code"))
    code, count = re.subn(r"^(.*EPOCHS = (?:\d+, )?)\d+$", rf"\g<1>{epochs}", code, flags=re.MULTILINE)
    assert count == 1
    found = {}
    exec(compile(code, f"{name}.ipynb", "exec"), found)
    assert pyplot.get_fignums()
    pyplot.close("all")
    return found


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of Matplotlib, given tensors
def test_the_digits_are_learned(monkeypatch, tmp_path):
    found = run("digits", monkeypatch, tmp_path, epochs=2)
    assert found["accuracy"] > 0.8
    assert found["digit"] == found["label"]
    assert all(0 < fired.mean() < 1 and len(fired) == 24 for fired in found["spikes"].values())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of snnTorch about itself
def test_a_network_of_snntorch_takes_a_tenth_of_the_memory_and_learns(monkeypatch, tmp_path):
    snntorch = pytest.importorskip("snntorch")
    monkeypatch.setattr(snntorch.SpikingNeuron, "instances", [])  # its reset reaches the neurons of all tests
    found = run("memory", monkeypatch, tmp_path, epochs=1)
    assert found["after"] < found["before"] / 10
    assert found["accuracy"] > 0.4


@pytest.mark.slow
def test_trainings_confirm_the_advice(monkeypatch, tmp_path):
    found = run("safe", monkeypatch, tmp_path, epochs=3)
    assert found["digits_cosine"] > 0.9 > 0.8 > found["recall_cosine"]
    last = {
        data: {rule: history[-1]["validation_accuracy"] for rule, history in curves.items()}
        for data, curves in found["curves"].items()
    }
    assert last["digits"]["SLTT()"] > last["digits"]["BPTT()"] - 0.05
    assert min(last["recall"]["BPTT()"], last["recall"]["OTTT()"]) > last["recall"]["SLTT()"] + 0.2


@pytest.mark.slow
@pytest.mark.timeout(900)  # several programs, one after the other
def test_the_events_are_classified_in_c_as_in_pytorch(monkeypatch, tmp_path):
    found = run("microcontroller", monkeypatch, tmp_path, epochs=2)
    assert found["right"] > 30
    assert abs(found["right"] / 100 - found["accuracy"]) < 0.1


def test_every_notebook_is_linked_and_in_the_navigation():
    names = {path.stem for path in NOTEBOOKS.glob("*.ipynb")}
    assert len(names) == 4
    for page in ("README.md", "docs/examples.md"):
        assert set(re.findall(r"notebooks/(\w+)\.ipynb\)", (NOTEBOOKS.parents[1] / page).read_text())) == names
    assert set(re.findall(r"notebooks/(\w+)\.md\n", (NOTEBOOKS.parents[1] / "mkdocs.yml").read_text())) == names
