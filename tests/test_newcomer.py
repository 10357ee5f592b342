"""The first hour of a newcomer, in a folder where nothing but the built package is."""

import json
import os
import shutil
import subprocess
import sys
import textwrap
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

import sltt
from sltt.commands.parsing import shipped_recipes
from sltt.models.base import SHIPPED

ROOT = Path(__file__).parents[1]
SCRIPT = """
    import torch
    from torch import nn

    import sltt


    class Recordings(torch.utils.data.Dataset):
        def __len__(self):
            return 60

        def __getitem__(self, index):
            if index >= len(self):
                raise IndexError
            generator = torch.Generator().manual_seed(index)
            return index % 3 + 0.1 * torch.randn(4 + index % 3, 5, generator=generator), index % 3


    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.hidden, self.neurons, self.out = nn.Linear(5, 24), sltt.LIF(tau=2.0), nn.Linear(24, 3)

        def forward(self, x):
            return self.out(self.neurons(self.hidden(x)))


    class Epochs(sltt.callbacks.Callback):
        def on_epoch(self, now):
            print("epoch", now.epoch)


    if __name__ == "__main__":
        print(sltt.__path__[0])
        data = sltt.data.from_datasets(Recordings(), 0.2, static=False, pad=True)
        how = dict(steps=6, epochs=20, batch_size=16, device="cpu", run="run")
        callbacks = [Epochs(), sltt.callbacks.EarlyStopping(4)]
        torch.manual_seed(0)
        model = Network()
        result = sltt.fit(model, data, sltt.SLTT(), callbacks=callbacks, **how)
        model = sltt.load("run", model)
        x, y = zip(*Recordings())
        lengths = [len(one) for one in x]
        x = torch.stack([nn.functional.pad(one, (0, 0, 0, 6 - len(one))) for one in x], dim=1)
        found = sltt.predict(model, x, lengths=lengths)
        print("right", (found.argmax(1) == torch.tensor(y)).float().mean().item())
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The wheel, and what is installed from it; other packages are those of the tests."""
    folder = tmp_path_factory.mktemp("package")
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, ROOT, cwd=folder)
    (wheel,) = folder.glob("sltt-*.whl")
    install = "install", "--quiet", "--no-deps", "--no-compile", "--target"
    run(sys.executable, "-m", "pip", *install, folder / "site", wheel, cwd=folder)
    return folder / "site"


@pytest.mark.slow
def test_the_wheel_holds_the_recipes_and_works_elsewhere(site, tmp_path):
    (wheel,) = site.parent.glob("sltt-*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {f"sltt/recipes/{name}.yaml" for name in shipped_recipes()} <= set(names)
    assert not [name for name in names if name.startswith(("tests", "benchmarks"))]
    elsewhere = {"PYTHONPATH": str(site)}
    out = run(site / "bin" / "sltt", "recipes", cwd=tmp_path, **elsewhere)
    assert [line.split()[0] for line in out.splitlines()] == list(shipped_recipes())
    out = run(sys.executable, "-c", "import sltt; print(sltt.__file__)", cwd=tmp_path, **elsewhere)
    assert out.splitlines() == [str(site / "sltt" / "__init__.py")]


@pytest.mark.slow
def test_a_newcomer_comes_from_own_data_to_a_report(site, tmp_path):
    pytest.importorskip("matplotlib", reason="the report needs it")
    (tmp_path / "task.py").write_text(textwrap.dedent(SCRIPT))
    environment = {"PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"}
    out = run(sys.executable, "task.py", cwd=tmp_path, **environment)
    assert out.startswith(f"{site / 'sltt'}\n")
    assert "epoch 1\n" in out
    assert float(out.split("right ")[1]) == 1.0
    out = run(sys.executable, "-m", "sltt", "report", "run", cwd=tmp_path, **environment)
    assert "report: run/report/report.html" in out
    assert "<h2>Training</h2>" in (tmp_path / "run" / "report" / "report.html").read_text()


@pytest.mark.slow
def test_a_packed_file_is_all_that_a_prediction_needs(site, tmp_path):
    shutil.copy(SHIPPED["speech"], tmp_path / "sent.sltt")
    x = torch.randn(50, 40, generator=torch.Generator().manual_seed(0))
    np.save(tmp_path / "x.npy", x)
    alone = {"PYTHONPATH": str(site), "HOME": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path)}
    (found,) = json.loads(run(site / "bin" / "sltt", "predict", "sent.sltt", "x.npy", "--json", cwd=tmp_path, **alone))
    expected = sltt.predict(sltt.models.pretrained("speech"), x[:, None]).argmax(1).item()
    assert found["class"] == expected


def run(*words, cwd, **environment):
    done = subprocess.run(
        [str(word) for word in words], cwd=cwd, env={**os.environ, **environment}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
