import gc
import inspect
import pkgutil
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
MEASURES = ["agreement", "count_operations", "firing_rates", "iteration_seconds", "layer_paths", "measure_energy"]
MEASURES += ["memory_parts", "neurobench", "peak_memory"]


PAGES = ["interop", "quickstart", "own-network", "own-neuron", "own-data", "own-task", "own-loop", "own-rule", "rules"]
PAGES += ["streams", "to-a-microcontroller", "pretrained", "share"]


@pytest.mark.slow
@pytest.mark.parametrize("name", PAGES)
def test_the_code_of_a_page_runs_as_written(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    if name == "interop":
        for library in ("snntorch", "nir", "onnxruntime", "onnxscript"):
            pytest.importorskip(library, reason="the page is on other libraries")
    if package := {"own-loop": "optuna", "share": "huggingface_hub"}.get(name):
        pytest.importorskip(package, reason="the page is on it")
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / f"{name}.md").read_text(), re.DOTALL)
    code = "\n".join(blocks).replace("n_trials=20", "n_trials=2")
    exec(compile(code, f"{name}.md", "exec"), {"__name__": name})
    gc.collect()  # a file that the page leaves open is warned of here, not in a later test
    out = capsys.readouterr().out
    if name == "quickstart":
        bptt, slt = (float(found) for found in re.findall(r"\) ([\d.]+) MB", out))
        assert slt < bptt / 2
    if name == "own-rule":
        mine, every, fourth = (float(cosine) for cosine in re.findall(r"cosine ([\d.]+)", out))
        assert mine == every > fourth > 0.5


def test_the_landing_page_has_the_code_of_the_readme():
    ours, readme = (
        re.search(r"```python\n(.*?)```", path.read_text(), re.DOTALL)
        for path in (DOCS / "index.md", DOCS.parent / "README.md")
    )
    assert ours
    assert readme
    assert ours[1] == readme[1]


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
        "batches": [(x, y)] * 20,
        **{name: getattr(sltt, name) for name in sltt.__all__},
        **{measure: getattr(analysis, measure) for measure in MEASURES},
    }
    exec(textwrap.dedent(example[1]), given)


def test_every_name_on_the_pages_exists():
    pages = [DOCS.parent / "README.md", *DOCS.glob("*.md")]
    names = {name for page in pages for name in re.findall(r"(?<!/)\bsltt\.[\w.]*\w", page.read_text())}
    assert len(names) > 50
    assert [name for name in sorted(names) if not _exists(name)] == []


def _exists(name):
    try:
        pkgutil.resolve_name(name)
    except ModuleNotFoundError as error:  # of another library that is not installed
        return not str(error.name).startswith("sltt")
    except (ImportError, AttributeError):
        return False
    return True


def test_every_recipe_is_in_the_table():
    table = (DOCS / "recipes.md").read_text()
    assert [name for name in shipped_recipes() if f"`{name}`" not in table] == []
