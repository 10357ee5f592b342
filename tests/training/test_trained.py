"""After a training in Python: the run has what the commands need, or says why not; it loads, predicts, has a card."""

import io
import os
import pickle
from functools import partial

import pytest
import torch
import yaml
from torch import nn

import sltt
from sltt.commands import main
from sltt.training.describe import UndescribedError, describe, pack, unpack
from sltt.training.trained import Trained
from tests.training.blobs import equal, network, train


class Net(nn.Module):
    def __init__(self, width=8):
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(64, width), sltt.LIF(tau=2.0), nn.Linear(width, 10))

    def forward(self, x):
        return self.layers(x)


class Held(sltt.data.Digits):
    """Keeps its argument under another name."""

    def __init__(self, share=0.1):
        super().__init__(validation=share)


def trained(folder, data=None, **settings):
    model = Net(width=12)
    sltt.fit(model, data or sltt.data.Digits(), device="cpu", run=folder, **{"epochs": 1, **settings})
    return model


def test_a_run_made_in_python_is_loaded_measured_reported_and_resumed_by_the_commands(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    loss, rule = nn.CrossEntropyLoss(), sltt.SLTT(k=2)
    phases = [sltt.Phase(1, lr=0.01)]
    model = trained("run", loss=loss, rule=rule, optimizer=partial(torch.optim.AdamW, lr=0.002), phases=phases)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "run").rename(tmp_path / "elsewhere" / "moved")
    run = "elsewhere/moved"
    assert main(["eval", run]) == 0
    expected = sltt.evaluate(model, sltt.data.Digits(), loss=loss, device="cpu")
    assert f"accuracy     {expected.accuracy:.2%}" in capsys.readouterr().out
    config = tmp_path / run / "config.yaml"
    settings = config.read_text()
    config.write_text(settings.replace("devices: null", "devices: 2"))  # as if two processes had trained
    assert main(["export", run, "--to", "nir"]) == 0
    config.write_text(settings)
    assert main(["report", run]) == 0
    assert "SLTT:k=2" in (tmp_path / run / "report" / "report.html").read_text()
    assert main(["train", "--resume", run, "--epochs", "2"]) == 0
    assert "| epoch | " in (card := (tmp_path / run / "card.md").read_text())
    assert "2 of 2" in card or "1 of 2" in card
    assert "not measured" not in card


def test_a_prediction_of_sequences_warns_of_a_batch_that_comes_first(caplog):
    model = nn.Sequential(nn.Linear(5, 3), sltt.LIF(tau=2.0))
    model.trained = Trained(steps=4, static=False, classes=3)
    for shape, warns in (((4, 2, 5), False), ((2, 4, 5), True), ((4, 4, 5), False), ((6, 2, 5), False)):
        caplog.clear()
        sltt.predict(model, torch.rand(shape))
        assert ("give x.transpose(0, 1)" in caplog.text) == warns


def test_a_loaded_network_predicts_as_the_trained_one(tmp_path):
    model = trained(tmp_path / "run", steps=3)
    x = torch.rand(5, 1, 8, 8)
    found = sltt.load(tmp_path / "run")
    assert found.trained == type(found.trained)(steps=3, static=True, classes=10)
    assert not found.training
    prediction = sltt.predict(found, x)
    assert prediction.shape == (5, 10)
    torch.testing.assert_close(prediction, sltt.predict(model, x, steps=3))
    torch.testing.assert_close(prediction, sltt.unroll(model.eval(), x, steps=3).mean(0))
    given = sltt.load(tmp_path / "run", Net(width=12), checkpoint="last")
    torch.testing.assert_close(sltt.predict(given, x), prediction)


def test_a_loaded_network_is_measured_at_the_t_of_its_training(tmp_path, caplog):
    loss, data = sltt.losses.OfLast(nn.CrossEntropyLoss()), sltt.data.Digits()
    model = trained(tmp_path / "run", data, loss=loss, rule=sltt.BPTT(), steps=3)
    expected = sltt.evaluate(model, data, loss=loss, steps=3, device="cpu")
    loaded = sltt.load(tmp_path / "run")
    assert sltt.evaluate(loaded, data, loss=loss, device="cpu").loss == expected.loss
    assert sltt.evaluate(loaded, data, loss=loss, steps=4, device="cpu").loss != expected.loss
    assert not caplog.messages
    sltt.evaluate(loaded, data, device="cpu")
    assert "trained with a loss that predicts by last, and is measured with one that predicts by mean" in caplog.text


def test_a_run_of_the_command_loads_by_the_network_that_its_recipe_names(tmp_path):
    run = str(tmp_path / "run")
    tiny = ["--epochs", "1", "--model.width", "2", "--model.neuron.tau", "3.0", "--device", "cpu"]
    assert main(["train", "digits", *tiny, "--run", run]) == 0
    found = sltt.load(run)
    assert found.features[2].tau == 3.0
    assert found.trained.classes == 10
    card = (tmp_path / "run" / "card.md").read_text()
    for part in (
        "DigitsNet",
        "SLTT() at T = 4",
        "split 5012bf79b0e0",
        "µJ for one sample",
        "test accuracy | ",
        "PyTorch",
    ):
        assert part in card
    assert "not measured" not in card


def test_the_energy_of_the_card_is_that_of_a_fixed_sample(tmp_path):
    class Augmented(torch.utils.data.Dataset):
        def __len__(self):
            return 60

        def __getitem__(self, i):
            return 3 * torch.randn(4), i % 3

    held_out = [(torch.ones(4), i % 3) for i in range(12)]
    energies = []
    for resume in (False, True):
        data = sltt.data.from_datasets(Augmented(), held_out, static=True)
        model = nn.Sequential(nn.Linear(4, 64), sltt.LIF(), nn.Linear(64, 3))
        train(tmp_path / "run", model, data, epochs=1, steps=4, resume=resume)
        energies += [line for line in (tmp_path / "run" / "card.md").read_text().splitlines() if "| energy |" in line]
    assert energies[0] == energies[1]
    assert "µJ" in energies[0]


def test_what_a_file_cannot_name_is_said_before_the_training(tmp_path, capsys):
    data = Held(0.2)
    trained(tmp_path / "run", data=data, optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1))
    shown = capsys.readouterr().out
    assert "cannot read this run: data: Held does not keep its argument share: set self.share in __init__" in shown
    assert "optimizer: " in shown
    assert "is defined within a function" in shown
    config = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert config["data"] is config["optimizer"] is None
    assert config["rule"]["class_path"] == "sltt.SLTT"
    for words in (["eval", str(tmp_path / "run")], ["train", "--resume", str(tmp_path / "run")]):
        assert main(words) == 2
        said = (
            "its data and optimizer cannot be made again from a file: go on in Python, as by sltt.evaluate(sltt.load("
        )
        assert f"{said}{str(tmp_path / 'run')!r}), data)" in capsys.readouterr().err
    assert sltt.evaluate(sltt.load(tmp_path / "run"), data, device="cpu").accuracy > 0


def test_a_network_that_cannot_be_kept_is_given_to_load(tmp_path, capsys):
    class Local(Net):
        pass

    model = Local()
    sltt.fit(model, sltt.data.Digits(), epochs=1, device="cpu", run=tmp_path / "run")
    assert "model: Local is defined within a function: move it to the top of a module" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"does not keep its network: make it, and call sltt.load\(.*, model\)"):
        sltt.load(tmp_path / "run")
    call = f"sltt.load({str(tmp_path / 'run')!r}, model)"
    assert f"`model = {call}`" in (tmp_path / "run" / "card.md").read_text()
    assert main(["eval", str(tmp_path / "run")]) == 2
    assert f"as by sltt.evaluate({call}, data)" in capsys.readouterr().err
    x = torch.rand(2, 1, 8, 8)
    torch.testing.assert_close(sltt.predict(sltt.load(tmp_path / "run", Local()), x), sltt.predict(model, x, steps=4))


DESCRIBED = [
    sltt.SLTT(k=2, recompute=True),
    sltt.BPTT(segment=2),
    sltt.TBPTT(3),
    sltt.OTTT(decay=0.5),
    sltt.RateBased(steady=True),
    sltt.Mixed({"a": "all", "b": 4}),
    sltt.schedules.Cosine(warmup=2),
    sltt.schedules.Step([3, 5], gamma=0.5),
    sltt.data.CIFAR10(root="somewhere", autoaugment=True),
    sltt.data.DVSGesture(root="somewhere", augment=sltt.data.EventAugmentation(roll=3)),
    sltt.data.EventFolder("somewhere", sensor=(34, 34), slicing="time"),
    sltt.data.ImageFolder("somewhere", size=32),
    sltt.data.SHD(root="somewhere"),
    sltt.data.SequentialDigits(permute=True),
    sltt.data.Recall(delay=3),
    sltt.data.Adding(marked=3),
]


@pytest.mark.parametrize("value", DESCRIBED, ids=lambda value: type(value).__name__)
def test_a_described_object_is_made_again(value):
    def make(described):
        kind = getattr(sltt, described["class_path"].removeprefix("sltt."), None)
        module, _, name = described["class_path"].rpartition(".")
        kind = kind or getattr(__import__(module, fromlist=[name]), name)
        arguments = {
            k: make(v) if isinstance(v, dict) and "class_path" in v else v for k, v in described["init_args"].items()
        }
        return kind(**arguments)

    described = describe(value)
    assert yaml.safe_load(yaml.safe_dump(described)) == described
    assert describe(make(described)) == described


class Limited(sltt.metrics.Accuracy):
    def __init__(self, limit=0.5, other=None):
        self.limit, self.other = limit, other


def test_none_is_kept_where_it_is_not_the_default():
    assert describe(Limited(None))["init_args"] == {"limit": None}
    assert describe(Limited(other=1))["init_args"] == {"limit": 0.5, "other": 1}


class Harm:
    def __reduce__(self):
        return os.system, ("exit 3",)


def test_a_file_that_names_a_program_is_refused():
    with pytest.raises(UndescribedError, match=r"holds (posix|nt)\.system, which is no torch\.nn\.Module"):
        pack(_holding(Harm()), nn.CrossEntropyLoss())
    file = io.BytesIO()
    torch.save({"model": Harm(), "loss": None}, file, pickle_module=pickle)
    with pytest.raises(UndescribedError, match="system"):
        unpack(file.getvalue())


def _holding(value):
    model = Net()
    model.value = value
    return model


def test_a_run_without_its_files_is_loaded_with_a_network_only(tmp_path):
    model, result = train(tmp_path / "run", epochs=1)
    for name in ("config.yaml", "network.pt"):
        (result.run / name).unlink(missing_ok=True)
    with pytest.raises(ValueError, match="does not keep its network: make it"):
        sltt.load(result.run)
    assert equal(sltt.load(result.run, network()).state_dict(), model.state_dict())
