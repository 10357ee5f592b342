import inspect
import re
import textwrap
from pathlib import Path

import pytest
import torch
from torch import nn

import sltt
from sltt import analysis
from sltt.commands.parsing import shipped_recipes

DOCS = Path(sltt.__file__).parents[1] / "docs"
MEASURES = [
    "agreement",
    "count_operations",
    "firing_rates",
    "iteration_seconds",
    "memory_parts",
    "peak_memory",
    "propose",
    "synaptic_operations",
]


@pytest.mark.slow
def test_the_tutorial_runs_as_written(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / "index.md").read_text(), re.DOTALL)
    exec(compile("\n".join(blocks), "index.md", "exec"), {})
    out = capsys.readouterr().out
    bptt, slt = (float(re.search(rf"{rule}\(\) ([\d.]+) MB", out)[1]) for rule in ("BPTT", "SLTT"))
    assert slt < bptt / 2


@pytest.mark.parametrize("name", MEASURES)
def test_the_example_of_a_measurement_runs(name):
    doc = inspect.getdoc(getattr(analysis, name))
    example = re.search(r"\n\n((?:    .*\n)+)", doc + "\n")
    assert example, "every measurement has an example"
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), sltt.LIF(), nn.Linear(8, 3))
    x, y = torch.randn(4, 5, 6), torch.randint(3, (5,))
    given = {
        "model": model,
        "x": x,
        "y": y,
        "target": y,
        "loss": sltt.losses.CrossEntropyMSE(),
        "rule": sltt.SLTT(),
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.1),
        "batches": [(x, y)] * 5,
        **vars(sltt),
        **{measure: getattr(analysis, measure) for measure in MEASURES},
    }
    exec(textwrap.dedent(example[1]), given)


def test_every_recipe_is_in_the_table():
    table = (DOCS / "recipes.md").read_text()
    assert [name for name in shipped_recipes() if f"`{name}`" not in table] == []


def test_every_page_is_in_the_navigation():
    navigation = (DOCS.parent / "mkdocs.yml").read_text()
    assert [page.name for page in DOCS.glob("*.md") if f"{page.name}\n" not in navigation] == []
