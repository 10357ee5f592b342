import json
import os
import platform
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
import torch
import yaml

import sltt
from sltt.commands import main
from sltt.commands.failures import cause
from sltt.commands.parsing import Recipe, shipped_recipes
from sltt.training.checkpoints import load_checkpoint

TINY = ["--model.width", "2", "--epochs", "2", "--steps", "2", "--batch_size", "256", "--device", "cpu"]


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(capsys, *words):
    code = main([str(w) for w in words])
    out, err = capsys.readouterr()
    return code, out, err


def test_train_then_eval(here, capsys):
    code, out, _ = run(capsys, "train", *TINY)
    assert code == 0
    (folder,) = (here / "runs").iterdir()
    assert folder.name.startswith("digits-sltt-")
    assert "samples: 1295 train, 143 validation, 359 test (split 5012bf79b0e0)" in out
    assert "epoch     loss  train acc  val acc  firing rate  seconds  peak memory" in out
    assert max(map(len, out.splitlines())) <= 110
    assert f"written to runs/{folder.name}" in out
    result = json.loads((folder / "result.json").read_text())
    assert f"test accuracy {result['test_accuracy']:.2%}" in out

    code, out, _ = run(capsys, "eval", folder, "--json")
    assert code == 0
    measured = json.loads(out)
    assert measured["accuracy"] == result["test_accuracy"]
    assert set(measured["layers"]) == {"features.2", "features.5", "features.9"}
    code, out, _ = run(capsys, "eval", folder, "--checkpoint", "last", "--steps", "3", "--split", "validation")
    assert code == 0
    assert "last.ckpt, T = 3, validation samples" in out
    code, out, _ = run(capsys, "eval", folder, "--mirror")
    assert code == 0
    assert "test samples and their mirror images" in out
    code, out, _ = run(capsys, "eval", folder, "--mirror", "--json")
    assert code == 0
    mirrored = json.loads(out)
    assert mirrored["mirror"]
    assert not measured["mirror"]
    assert mirrored["firing_rate"] != measured["firing_rate"]  # the logits of this network are constant


def test_the_weights_of_the_best_and_of_the_last_epoch_are_both_tested(here, capsys):
    spoiling = ["--optimizer.lr", "3", "--schedule", "sltt.schedules.Constant"]  # the second epoch undoes the first
    words = ["--model.width", "4", "--epochs", "2", "--steps", "2", "--batch_size", "128", "--device", "cpu", *spoiling]
    assert run(capsys, "train", "digits", *words, "--run", "a")[0] == 0
    result = json.loads(Path("a/result.json").read_text())
    assert result["epoch"] == 1
    assert result["test_accuracy"] != result["last_epoch_test_accuracy"]
    for checkpoint, name in [("best", "test_accuracy"), ("last", "last_epoch_test_accuracy")]:
        code, out, _ = run(capsys, "eval", "a", "--checkpoint", checkpoint, "--json")
        assert code == 0
        assert json.loads(out)["accuracy"] == result[name]


def test_any_value_can_be_overridden_and_is_kept(here, capsys):
    words = [
        "--rule",
        "SLTT",
        "--rule.k",
        "2",
        "--optimizer.lr",
        "0.05",
        "--model.neuron.tau",
        "1.5",
        "--data.validation",
        "0",
    ]
    assert (
        run(capsys, "train", "digits-events", *TINY, "--epochs", "1", "--data.size", "12", *words, "--run", "a")[0] == 0
    )
    config = yaml.safe_load(Path("a/config.yaml").read_text())
    assert config["rule"]["class_path"] == "sltt.SLTT"
    assert config["rule"]["init_args"]["k"] == 2
    assert config["optimizer"]["init_args"]["lr"] == 0.05
    assert config["model"]["init_args"]["neuron"]["init_args"]["tau"] == 1.5
    assert load_checkpoint(Path("a/last.ckpt"))["config"] == config
    code, out, _ = run(capsys, "eval", "a")
    assert code == 0
    assert "last.ckpt" in out


def test_a_recipe_of_ones_own(here, capsys):
    assert run(capsys, "recipes", "digits")[0] == 0
    Path("mine.yaml").write_text(run(capsys, "recipes", "digits")[1])
    assert run(capsys, "train", "mine.yaml", *TINY, "--epochs", "1", "--rule", "TBPTT", "--rule.window", "2")[0] == 0
    assert [p.name[:10] for p in Path("runs").iterdir()] == ["mine-tbptt"]


def test_resume_takes_the_runs_configuration(here, capsys):
    assert run(capsys, "train", *TINY, "--run", "a")[0] == 0
    code, out, _ = run(capsys, "train", "--resume", "a", "--epochs", "3")
    assert code == 0
    assert "continuing a" in out
    code, _, err = run(capsys, "train", "--resume", "a", "--optimizer.lr", "3")
    assert code == 2
    assert "sltt train --resume does not take --optimizer.lr: a run continues with its own settings" in err
    assert len(Path("a/metrics.csv").read_text().splitlines()) == 4
    assert yaml.safe_load(Path("a/config.yaml").read_text())["epochs"] == 3


PAPER = {  # T, K, batch, epochs, learning rate, weight decay, α
    "cifar10": (6, None, 128, 200, 0.1, 5e-5, 0.05),
    "cifar100": (6, None, 128, 200, 0.1, 5e-4, 0.05),
    "dvs-cifar10": (10, 2, 128, 300, 0.05, 5e-4, 0.05),
    "dvs-gesture": (20, 4, 16, 300, 0.1, 5e-4, 0.05),
    "imagenet-stage1": (1, None, 256, 100, 0.1, 1e-5, 0.0),
    "imagenet-stage2": (6, 1, 256, 30, 0.001, 0.0, 0.0),
}


@pytest.mark.parametrize("name", PAPER)
def test_recipes_have_the_values_of_the_paper(name):
    recipe = yaml.safe_load(shipped_recipes()[name].read_text())
    optimizer, k = recipe["optimizer"]["init_args"], recipe["rule"].get("init_args", {}).get("k")
    assert (
        *(recipe["steps"], k, recipe["batch_size"], recipe["epochs"], optimizer["lr"], optimizer["weight_decay"]),
        recipe["loss"]["init_args"]["alpha"],
    ) == PAPER[name]
    assert optimizer["momentum"] == 0.9
    assert recipe["model"]["init_args"]["neuron"]["init_args"]["tau"] == 1.1


def test_imagenet_is_its_two_stages():
    whole, *stages = (
        yaml.safe_load(shipped_recipes()[f"imagenet{end}"].read_text()) for end in ("", "-stage1", "-stage2")
    )
    assert [phase["epochs"] for phase in whole["phases"]] == [stage["epochs"] for stage in stages]
    assert [phase["steps"] for phase in whole["phases"]] == [stage["steps"] for stage in stages]
    assert [phase["lr"] for phase in whole["phases"]] == [stage["optimizer"]["init_args"]["lr"] for stage in stages]
    assert whole["model"] == stages[0]["model"] == stages[1]["model"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["trian"], "unknown command 'trian'; did you mean train?"),
        (["train", "digit"], "unknown recipe 'digit'; did you mean digits?"),
        (["train", "none.yaml"], "no file none.yaml"),
        (["train", "--epohcs", "3"], "unknown option --epohcs; did you mean --epochs?"),
        (["train", "--rule.q", "3"], "unknown key 'q' of sltt.SLTT"),
        (["train", "--model.widht", "3"], "unknown key 'widht' of sltt.models.DigitsNet; did you mean width?"),
        (["train", "--model.neuron.tua", "3"], "unknown key 'tua' of sltt.LIF; did you mean tau?"),
        (["train", "--rule", "SLT"], "unknown class 'SLT'; did you mean sltt.SLTT?"),
        (["train", "--model", "resnet18"], "unknown class 'resnet18'; did you mean sltt.models.resnet18?"),
        (["train", "--rule", "os.system"], "'os.system' is not allowed"),
        (["train", "--rule", "torch.nn.Linear"], "torch.nn.Linear does not correspond to a subclass of Rule"),
        (["train", "--data", "sltt.SLTT"], "sltt.SLTT does not correspond to a subclass of Data"),
        (["train", "--optimizer", "torch.nn.Linear"], "to be a subclass of <class 'Optimizer'>"),
        (["train", "--rule", "TBPTT"], "window"),
        (["train", "--epochs", "x"], "epochs: expected int, got x"),
        (["train", "--rule.k", "1.5"], "rule.k: expected int or null, got 1.5"),
        (["train", "--device", "tpu"], "device: expected ['auto', 'cpu', 'cuda'], got tpu"),
        (["train", "digits", "--resume", "a"], "leave out 'digits'"),
        (["train", "--resume", "nowhere", "--batch_size", "3"], "nowhere is not the folder of a run"),
        (["train", "--resume", "nowhere"], "nowhere is not the folder of a run"),
        (["eval", "nowhere"], "nowhere is not the folder of a run"),
    ],
)  # fmt: skip
def test_wrong_usage_is_explained_and_leaves_nothing(here, capsys, words, message):
    code, _, err = run(capsys, *words)
    assert code == 2
    assert message in err
    assert list(here.iterdir()) == []


def test_an_unknown_key_in_a_file_is_explained(here, capsys):
    recipe = yaml.safe_load(shipped_recipes()["digits"].read_text())
    Path("a.yaml").write_text(yaml.safe_dump({**recipe, "epohcs": 3}))
    assert "unknown key 'epohcs'; did you mean epochs?" in run(capsys, "train", "a.yaml")[2]
    recipe["data"]["init_args"]["validaton"] = 0.5
    Path("a.yaml").write_text(yaml.safe_dump(recipe))
    assert "unknown key 'validaton' of sltt.data.Digits; did you mean validation?" in run(capsys, "train", "a.yaml")[2]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--rule", "SLTT", "--rule.k", "9"], "SLTT(k=9) trains 9 steps, but the sequence has T = 2; use k ≤ T"),
        (["--rule", "TBPTT", "--rule.window", "0"], "window must be at least 1"),
        (["--steps", "0"], "steps must be at least 1"),
        (["--model.neuron.tau", "1"], "tau must be greater than 1"),
        (["--model.in_channels", "3"], "expected one time step [B, 3, H, W], got shape [256, 1, 8, 8]"),
        (["--model.classes", "4"], "labels must be in 0 … 3 (the model has 4 outputs)"),
        (["--data.validation", "1.5"], "validation must be at least 0 and less than 1"),
        (["--data", "sltt.data.CIFAR10"], "CIFAR-10 not found"),
        (["--data", "sltt.data.ImageFolder", "--data.root", "nowhere"], "no images found: looked in"),
        (["--run", "/proc/nowhere/run"], "cannot make the run folder"),
    ],
)
def test_bad_input_gets_a_clear_error(here, capsys, words, message):
    code, _, err = run(capsys, "train", *TINY, *words)
    assert code == 1
    assert message in err
    assert "Traceback" not in err


def test_eval_refuses_options_that_would_do_nothing_and_damaged_checkpoints(here, capsys):
    run(capsys, "train", *TINY, "--epochs", "1", "--run", "a")
    code, _, err = run(capsys, "eval", "a", "--epochs", "3")
    assert code == 2
    assert "sltt eval does not take --epochs" in err
    Path("a/best.ckpt").write_bytes(Path("a/best.ckpt").read_bytes()[:5000])
    code, _, err = run(capsys, "eval", "a")
    assert code == 1
    assert "a/best.ckpt is truncated or not a checkpoint" in err
    Path("a/best.ckpt").unlink()
    Path("a/last.ckpt").unlink()
    code, _, err = run(capsys, "eval", "a")
    assert code == 1
    assert "no checkpoint in a" in err


def test_recipes_lists_each_with_a_line(capsys):
    code, out, _ = run(capsys, "recipes")
    assert code == 0
    assert [line.split()[0] for line in out.splitlines()] == list(shipped_recipes())


def test_doctor_tells_versions_device_compiler_and_threads(capsys):
    code, out, _ = run(capsys, "doctor")
    assert code == 0
    for word in (sltt.__version__, torch.__version__, "device", "C++ compiler", "threads", "bf16-mixed"):
        assert word in out


def test_doctor_shows_brackets_and_what_each_package_is_for(capsys):
    _, out, _ = run(capsys, "doctor")
    lines = {line.split()[0]: line for line in out.splitlines()}
    assert "pip install 'sltt[events]'" in " ".join(out.split())
    assert "sltt report" in lines["matplotlib"]


def test_a_module_in_the_working_directory_is_found(here, capsys, monkeypatch):
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path not in ("", str(here))])
    Path("beside.py").write_text("import sltt\n\nclass Net(sltt.models.DigitsNet):\n    pass\n")
    assert run(capsys, "train", "--model", "beside.Net", *TINY, "--epochs", "1", "--run", "a")[0] == 0
    assert yaml.safe_load(Path("a/config.yaml").read_text())["model"]["class_path"] == "beside.Net"


def test_a_module_that_is_missing_is_named_and_not_installed(capsys):
    code, _, err = run(capsys, "train", *TINY, "--optimizer", "no_such_package.optim.Muon")
    assert code == 2
    assert err.startswith(
        "sltt: optimizer: there is no module no_such_package; expected no_such_package.py in this folder"
    )
    code, _, err = run(capsys, "train", *TINY, "--optimizer", "torch.no_such_module.Muon")
    assert code == 2
    assert "torch.no_such_module" in err
    assert "pip install" not in err


def test_a_second_ctrl_c_has_a_line_too(capsys, monkeypatch):
    def interrupted(words):
        raise KeyboardInterrupt

    monkeypatch.setattr("sltt.commands.doctor.run", interrupted)
    assert run(capsys, "doctor") == (130, "", "sltt: stopped by Ctrl-C\n")


def test_the_traceback_is_shown_when_it_is_asked_for(monkeypatch):
    monkeypatch.setenv("SLTT_TRACEBACK", "1")
    with pytest.raises(ValueError, match="there is no folder nowhere"):
        main(["report", "nowhere"])


def test_a_failed_worker_of_the_data_loader_is_told_in_a_line():
    trace = 'Original Traceback (most recent call last):\n  File "mine.py", line 3\nKeyError: 7\n'
    error = RuntimeError(f"Caught KeyError in DataLoader worker process 0.\n{trace}")
    assert cause(error) == "Caught KeyError in DataLoader worker process 0: KeyError: 7"


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries are left as they are")
def test_train_keeps_freed_memory_until_it_is_returned():
    code = """
import resource, sys, torch
from sltt.commands import COMMANDS, main
from sltt.commands.failures import cause
from sltt.parallel.devices import return_freed_memory
main(["train", *sys.argv[1:]])
faults = []
for turn in range(4):
    if turn == 3:
        return_freed_memory()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(2**24)
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(*faults)
"""
    words = [sys.executable, "-c", code, "--nonsense"]
    result = subprocess.run(words, env=environment(), capture_output=True, text=True)
    first, second, third, returned = (int(word) for word in result.stdout.split())
    assert max(second, third) < first / 10 < returned / 5


def test_help_explains_every_option(capsys):
    assert run(capsys)[0] == 2
    code, out, _ = run(capsys, "--help")
    assert code == 0
    assert "sltt train [RECIPE]" in out
    with pytest.raises(SystemExit) as stop:
        main(["train", "--help"])
    assert stop.value.code == 0
    out = capsys.readouterr().out
    assert "T, the number of time steps. (type: int, default: 4)" in " ".join(out.split())
    assert len(out.splitlines()) < 200


def environment():
    return {**os.environ, "OMP_NUM_THREADS": "1"}


@pytest.mark.slow
def test_ctrl_c_in_the_terminal_ends_with_a_clear_line(here):
    words = [sys.executable, "-m", "sltt", "train", *TINY, "--epochs", "1000", "--run", "a"]
    process = subprocess.Popen(words, env=environment(), stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    while not Path("a/last.ckpt").exists():
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err.strip() == "sltt: stopped by Ctrl-C; continue with --resume a"


@pytest.mark.slow
def test_the_wheel_holds_the_recipes_and_works_elsewhere(here):
    project = Path(sltt.__file__).parents[1]
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(here), str(project)]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = here.glob("sltt-*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {f"sltt/recipes/{name}.yaml" for name in shipped_recipes()} <= set(names)
    assert not [name for name in names if name.startswith(("tests", "benchmarks"))]
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", "site", str(wheel)]
    subprocess.run(install, check=True, capture_output=True)
    elsewhere = {**environment(), "PYTHONPATH": str(here / "site")}
    result = subprocess.run([here / "site/bin/sltt", "recipes"], env=elsewhere, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert [line.split()[0] for line in result.stdout.splitlines()] == list(shipped_recipes())
    heavy = "{'sklearn', 'lightning_fabric', 'torchvision', 'tensorboard'}"
    code = f"import sltt, sys; print(sltt.__file__); print({heavy} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], env=elsewhere, capture_output=True, text=True)
    assert result.stdout.splitlines() == [str(here / "site/sltt/__init__.py"), "set()"]


FRAMES = {
    "digits": (1, 8, 8),
    "digits-events": (2, 16, 16),
    "cifar10": (3, 32, 32),
    "cifar10-small": (3, 32, 32),
    "cifar100": (3, 32, 32),
    "dvs-cifar10": (2, 48, 48),
    "dvs-gesture": (2, 128, 128),
    "imagenet": (3, 64, 64),  # of any size
    "imagenet-stage1": (3, 64, 64),
    "imagenet-stage2": (3, 64, 64),
    "nmnist": (2, 34, 34),
    "recall": (200,),
    "recall-marked": (21,),
    "sequential-digits": (8,),
    "shd": (700,),
}
CLASSES = {
    "cifar100": 100,
    "dvs-gesture": 11,
    "recall": 4,
    "recall-marked": 2,
    "shd": 20,
    **{f"imagenet{end}": 1000 for end in ("", "-stage1", "-stage2")},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", shipped_recipes())
def test_every_recipe_runs_a_batch_of_its_shape(name):
    built = Recipe("sltt train", name, []).build()
    assert isinstance(built.data, sltt.data.Data)
    x, steps = 3 * torch.rand(2, *FRAMES[name]), min((getattr(built.rule, "k", None) or 1) + 1, built.steps)
    for rule, crop in [(built.rule, None), *((phase.rule or built.rule, phase.crop) for phase in built.phases or [])]:
        built.model.zero_grad()
        out = rule(built.model, x[..., :crop, :crop] if crop else x, torch.tensor([0, 1]), built.loss, steps=steps)
        assert out.loss.isfinite()
        assert out.logits.shape == (steps, 2, CLASSES.get(name, 10))
        assert any(p.grad is not None and p.grad.abs().max() > 0 for p in built.model.parameters())
    assert built.optimizer(built.model.parameters()).param_groups[0]["lr"] > 0


def test_data_check_says_whether_the_data_is_whole(tmp_path, capsys):
    assert main(["data", "check", "digits"]) == 0
    out = capsys.readouterr().out
    assert "train" in out
    assert "nothing is missing" in out
    assert main(["data", "check", "cifar10", "--data.root", str(tmp_path)]) == 1
    assert str(tmp_path) in capsys.readouterr().err
    for words in (
        ["data"],
        ["data", "check"],
        ["data", "look", "digits"],
        ["data", "check", "digits", "--epochs", "3"],
    ):
        assert main(words) == 2
