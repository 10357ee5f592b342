"""A run folder is data: its files are the ones that were written, and no code of it runs."""

import os
import pickle
import re
import shutil
import sys
from importlib.machinery import PathFinder
from pathlib import Path

import pytest
import yaml

import sltt
from sltt.commands import main
from sltt.commands.parsing import find_recipe
from sltt.commands.results import gather
from sltt.training.checkpoints import load_checkpoint, save_checkpoint
from sltt.training.runs import read_config, write_config
from tests.commands.tiny import edit

TINY = ["--model.width", "2", "--steps", "1", "--epochs", "1", "--batch_size", "512", "--device", "cpu"]
EVIL = (
    "open({mark!r}, 'w')\nimport sltt, torch\nclass D(sltt.data.Digits): pass\nclass N(sltt.models.DigitsNet): pass\n"
)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of one epoch."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    assert main(["train", "digits", *TINY, "--run", str(folder)]) == 0
    return folder


@pytest.fixture
def run(trained, tmp_path, monkeypatch):
    """A copy of it, in the working directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    return Path(shutil.copytree(trained, "run"))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("model", {"class_path": "run.evil.N"}),
        ("model", {"class_path": "linked.N"}),
        ("model", "{class_path: run.evil.N}"),
        ("model", {"class_path": "sltt.models.DigitsNet", "init_args": {"neuron": {"class_path": "run.evil.N"}}}),
        ("data", {"class_path": "run.evil.D"}),
        ("rule", {"class_path": "run.evil.D"}),
        ("optimizer", "run.evil.D"),
        ("metric", {"class_path": "run.evil.D"}),
        ("callbacks", [{"class_path": "run.evil.D"}]),
        ("loggers", [{"class_path": "run.evil.D"}]),
    ],
)
def test_no_code_in_a_run_folder_runs(name, value, run, capsys, monkeypatch):
    mark = str(Path("mark").resolve())
    (run / "evil.py").write_text(EVIL.format(mark=mark))
    Path("linked.py").symlink_to(run / "evil.py")
    monkeypatch.syspath_prepend(".")  # as the user may have it
    edit(run, **{name: value})
    resume = ["train", "--resume", "run", "--epochs", "2"]
    for words in [resume] if isinstance(value, list) else [["eval", "run"], ["export", "run", "--to", "nir"], resume]:
        assert main([*words, "--code", "."]) != 0
        assert re.search("which lies within the run: a run is data|would read again", capsys.readouterr().err)
    gather([run])
    if name == "model":
        with pytest.raises(ValueError, match=r"(run.evil|linked), which is neither of sltt|would read again"):
            sltt.load("run")
    assert not Path(mark).exists()
    assert "run.evil" not in sys.modules


GRAPH = {"body": {"_code": "; forward = print"}, "import_block": "import pathlib; pathlib.Path('mark').touch()"}


class Holding(sltt.losses.CrossEntropyMSE):
    """A loss with an argument that may be anything."""

    def __init__(self, value):
        super().__init__()


def holding(name):
    value = {"class_path": name, "init_args": {"args": "touch mark", "name": "evil.so"}}
    return {"class_path": "tests.commands.test_run_settings.Holding", "init_args": {"value": value}}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("model", {"class_path": "os.system", "init_args": {"command": "touch mark"}}),
        ("model", {"class_path": "subprocess.Popen", "init_args": {"args": ["touch", "mark"]}}),
        ("model", {"class_path": "sltt.commands.main", "init_args": {"arguments": ["recipes"]}}),
        ("model", {"class_path": "sltt.kernels.native._open", "init_args": {"path": "run/evil.so"}}),
        ("model", {"class_path": "torch.fx.graph_module.reduce_graph_module", "init_args": GRAPH}),
        ("model", {"class_path": "sltt.load", "init_args": {"run": "run"}}),
        ("model", {"class_path": "numpy.f2py.__main__.Net"}),
        ("model", {"class_path": "this.Net"}),  # which prints when it is imported
        ("model", " this.Net "),
        ("model", "{class_path: this.Net}"),
        ("model.class_path", "this.Net"),
        ("config", "settings.yaml"),
        ("model", {"class_path": "test.autotest.Net"}),  # which is no module of the standard library by its list
        ("optimizer", "antigravity.x"),
        ("optimizer", "os.system"),
        ("optimizer", {"class_path": "subprocess.Popen", "init_args": {"args": ["touch", "mark"]}}),
        *(("loss", holding(name)) for name in ("os.system", "ctypes.CDLL", "torch.hub.load", "torch.ops.load_library")),
    ],
)
def test_a_run_names_no_function_that_runs_programs(name, value, run, capsys):
    Path("settings.yaml").write_text("model: {class_path: this.Net}")
    edit(run, **{name: value})
    assert main(["eval", "run"]) != 0
    assert main(["train", "--resume", "run", "--epochs", "2"]) != 0
    gather([run])
    assert not Path("mark").exists()
    assert not {"this", "test.autotest", "antigravity"} & sys.modules.keys()


def test_code_of_the_working_directory_is_taken_where_the_user_says_so(run, capsys, monkeypatch):
    Path("own_net.py").write_text("import sltt\nclass Net(sltt.models.DigitsNet):\n    pass\n")
    settings = yaml.safe_load((run / "config.yaml").read_text())["model"]
    edit(run, model={**settings, "class_path": "own_net.Net"})
    for words in (["eval", "run"], ["train", "--resume", "run"]):
        assert main(words) == 1
        assert "name own_net, which is neither of sltt" in (said := capsys.readouterr().err)
        assert "--code FOLDER takes classes from a folder too" in said
    assert main(["eval", "run", "--code", "nosuch"]) == 2
    assert "--code nosuch is no folder: name the one" in capsys.readouterr().err
    monkeypatch.setattr(sys, "path", ["", *sys.path])
    with pytest.raises(ValueError, match=r"nor code of yours: .* in Python import own_net"):
        sltt.load("run")
    assert main(["eval", "run", "--code", "."]) == 0
    assert type(sltt.load("run")).__name__ == "Net"  # it is imported
    assert main(["train", "--resume", "run", "--epochs", "2", "--code", "."]) == 0


def test_the_working_directory_is_no_folder_of_code_and_replaces_no_package(run, monkeypatch):
    settings = yaml.safe_load((run / "config.yaml").read_text())["model"]
    edit(run, model={**settings, "class_path": "nearby.Net"})
    Path("nearby.py").write_text("open('mark', 'w')")
    monkeypatch.setattr(sys, "path", [os.getcwd(), *sys.path])  # as of an empty entry of PYTHONPATH
    assert main(["eval", "run"]) == 1
    monkeypatch.setattr(sys, "path", sys.path[1:])
    Path("colorsys.py").write_text("")
    find_recipe("digits")
    assert Path(PathFinder.find_spec("colorsys").origin).parent != Path.cwd()
    assert sys.path[0] != ""
    assert sys.path[-1] == os.getcwd()
    assert not Path("mark").exists()


@pytest.mark.parametrize("name", [".lock", "graph.nir", "tensorboard", "report"])
def test_nothing_is_written_through_a_link_in_a_run(name, run, capsys):
    edit(run)
    Path("mine").mkdir() if name in ("tensorboard", "report") else Path("mine").write_text("mine")
    os.system(f"rm -rf run/{name}")
    (run / name).symlink_to(Path("mine").resolve())
    for words in (["report", "run"], ["export", "run", "--to", "nir"], ["train", "--resume", "run", "--epochs", "3"]):
        main(words)
        assert f"run/{name} is a link" in "".join(capsys.readouterr())
    assert Path("mine").read_text() == "mine" if Path("mine").is_file() else not list(Path("mine").iterdir())


def test_a_report_replaces_links_to_files_and_refuses_those_to_folders(run, capsys):
    Path("mine").write_text("mine")
    (run / "report" / "data").mkdir(parents=True)
    (run / "report" / "data" / "runs.csv").symlink_to(Path("mine").resolve())
    assert main(["report", "run"]) == 0
    os.system("rm -r run/report/figures; mkdir there; ln -s ../../there run/report/figures")
    assert main(["report", "run"]) == 1
    assert "run/report/figures is a link: remove it" in capsys.readouterr().err
    assert Path("mine").read_text() == "mine"
    assert not list(Path("there").iterdir())


def test_the_name_of_a_metric_is_no_path(run):
    for path in run.glob("*.ckpt"):
        content = load_checkpoint(path)
        for row in content["progress"]["history"]:
            for part in ("train", "validation"):
                row[f"{part}_x/../../../planted"] = row.pop(f"{part}_accuracy")
        save_checkpoint(path, content)
    (run / "report" / "figures" / "1-x").mkdir(parents=True)
    assert main(["report", "run"]) == 0
    assert not list(Path().rglob("planted*"))
    assert list((run / "report" / "figures").glob("*planted*"))


def test_a_setting_that_is_left_out_is_that_of_the_training(run):
    checkpoint = load_checkpoint(run / "best.ckpt")
    settings = yaml.safe_load((run / "config.yaml").read_text())
    write_config(run, {name: value for name, value in settings.items() if name != "steps"})
    assert read_config(run, checkpoint)["steps"] == 1


def test_settings_that_are_no_plain_yaml_are_named(run, capsys):
    (run / "config.yaml").write_text("model: !!python/object/apply:os.system [touch mark]")
    assert main(["eval", "run"]) == 1
    assert "run/config.yaml is damaged: could not determine a constructor" in capsys.readouterr().err
    assert not Path("mark").exists()


class Harm:
    def __reduce__(self):
        return Path.touch, (Path("mark"),)


def test_a_pickle_in_a_run_folder_is_not_read(run):
    (run / "network.pt").write_bytes(pickle.dumps(Harm()))
    sltt.load("run")
    assert main(["eval", "run"]) == 0
    assert main(["report", "run"]) == 0
    assert not Path("mark").exists()


def test_settings_that_are_not_those_of_the_training_are_refused(run, capsys):
    file = run / "config.yaml"
    text = file.read_text()
    for changed, told in (
        (text.replace("tau: 1.1", "tau: 1.3"), "tau was 1.1 and is 1.3. Restore"),
        ("", "config.yaml is damaged: no settings. Restore it, or delete it"),
    ):
        assert changed != text
        file.write_text(changed)
        for words in (["train", "--resume", "run"], ["eval", "run"], ["export", "run", "--to", "nir"]):
            assert main(words) == 1
            assert re.search(told, capsys.readouterr().err)
        with pytest.raises(ValueError, match=told):
            sltt.load("run")
    assert not gather([run]).notes
    file.unlink()
    assert main(["eval", "run"]) == 0
    assert main(["train", "--resume", "run", "--epochs", "2"]) == 0
    assert yaml.safe_load(file.read_text()) == {**yaml.safe_load(text), "epochs": 2}


def test_the_best_checkpoint_of_another_run_is_refused(run, tmp_path):
    other = tmp_path / "other"
    assert main(["train", "digits", *TINY, "--model.neuron.tau", "3", "--run", str(other)]) == 0
    (run / "best.ckpt").write_bytes((other / "best.ckpt").read_bytes())
    with pytest.raises(ValueError, match=r"model.init_args.neuron.init_args.tau was 3.0 and is 1.1"):
        sltt.load("run")
    (run / "best.ckpt").write_bytes((run / "last.ckpt").read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"best.ckpt is damaged.* take the other one of the run by --checkpoint"):
        sltt.load("run")
    assert main(["eval", "run", "--checkpoint", "last"]) == 0
