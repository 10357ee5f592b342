"""After a training: the run loads, predicts, is reported, and has a card."""

import importlib
import sys
from functools import partial

import pytest
import torch
import yaml
from torch import nn

import sltt
from sltt.commands import main
from sltt.training.runs import describe_layers
from sltt.training.trained import Trained
from tests.training.blobs import Blobs, equal, network, train


@pytest.mark.slow
def test_a_run_made_in_python_is_reported_by_the_command_and_used_in_python(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    loss, rule = nn.CrossEntropyLoss(), sltt.SLTT(k=2)
    phases = [sltt.Phase(1, lr=0.01)]
    model, _ = train("run", loss=loss, rule=rule, phases=phases, epochs=1)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "run").rename(tmp_path / "elsewhere" / "moved")
    run = "elsewhere/moved"
    assert main(["report", run]) == 0
    assert "SLTT:k=2" in (tmp_path / run / "report" / "report.html").read_text()
    card = (tmp_path / run / "card.md").read_text()
    assert all(part in card for part in ("SLTT(k=2) at T = 4", "Blobs, split", "`model = sltt.load('run', model)`"))
    for words in (["eval", run], ["export", run, "--to", "nir"], ["train", "--resume", run, "--epochs", "2"]):
        capsys.readouterr()
        assert main(words) == 1
        said = capsys.readouterr().err
        assert f"{run} was made in Python, and does not keep its network and data" in said
        assert f"sltt.load('{run}', model) gives what evaluate, predict, to_c and to_onnx take" in said
    with pytest.raises(ValueError, match=r"was made in Python.*make it, and call sltt.load\('.*moved', model\)"):
        sltt.load(run)
    x = torch.rand(2, 4)
    torch.testing.assert_close(sltt.predict(sltt.load(run, network()), x), sltt.predict(model, x, steps=4))
    assert "elsewhere" not in (tmp_path / run / "config.yaml").read_text()


def test_a_run_of_a_recipe_goes_on_in_python_with_its_recipe(tmp_path):
    run = tmp_path / "run"
    words = ["--epochs", "1", "--steps", "1", "--batch_size", "512", "--device", "cpu", "--model.width", "2"]
    assert main(["train", "digits", *words, "--run", str(run)]) == 0
    before = yaml.safe_load((run / "config.yaml").read_text())
    arguments = {"optimizer": partial(torch.optim.AdamW, lr=0.005, weight_decay=1e-4), "steps": 1, "batch_size": 512}
    sltt.fit(sltt.models.DigitsNet(width=2), sltt.data.Digits(), epochs=2, **arguments, run=run, resume=True)
    assert yaml.safe_load((run / "config.yaml").read_text()) == {**before, "epochs": 2, "device": "auto"}
    assert sltt.load(run).trained.steps == 1


def test_a_prediction_of_sequences_warns_of_a_batch_that_comes_first(caplog):
    model = nn.Sequential(nn.Linear(5, 3), sltt.LIF(tau=2.0))
    model.trained = Trained(steps=4, static=False, classes=3)
    for shape, warns in (((4, 2, 5), False), ((2, 4, 5), True), ((4, 4, 5), False), ((6, 2, 5), False)):
        caplog.clear()
        sltt.predict(model, torch.rand(shape))
        assert ("give x.transpose(0, 1)" in caplog.text) == warns


def test_a_loaded_network_predicts_as_the_trained_one(tmp_path):
    model, _ = train(tmp_path / "run", steps=3, epochs=1)
    x = torch.rand(5, 4)
    found = sltt.load(tmp_path / "run", network())
    assert model.trained == found.trained == Trained(steps=3, static=True, classes=3, split="blobs")
    assert not found.training
    prediction = sltt.predict(found, x)
    assert prediction.shape == (5, 3)
    torch.testing.assert_close(prediction, sltt.predict(model, x))  # which knows T since its training
    torch.testing.assert_close(prediction, sltt.unroll(model.eval(), x, steps=3).mean(0))
    given = sltt.load(tmp_path / "run", network(), checkpoint="last")
    torch.testing.assert_close(sltt.predict(given, x), prediction)


def test_a_loaded_network_is_measured_at_the_t_of_its_training(tmp_path, caplog):
    loss, data = sltt.losses.OfLast(nn.CrossEntropyLoss()), Blobs()
    model, _ = train(tmp_path / "run", loss=loss, rule=sltt.BPTT(), steps=3, epochs=1)
    expected = sltt.evaluate(model, data, loss=loss, steps=3, device="cpu")
    loaded = sltt.load(tmp_path / "run", network())
    assert sltt.evaluate(loaded, data, loss=loss, device="cpu").loss == expected.loss
    assert sltt.evaluate(loaded, data, loss=loss, steps=4, device="cpu").loss != expected.loss
    assert not caplog.messages
    sltt.evaluate(loaded, data, device="cpu")
    assert "the loss of the training predicts by last, and this one by mean" in caplog.text


def test_a_run_of_the_command_loads_by_the_network_that_its_recipe_names(tmp_path):
    run = str(tmp_path / "run")
    tiny = ["--epochs=1", "--model.width=2", "--model.neuron.tau=3.0", "--device=cpu", "--batch_size=512"]
    assert main(["train", "digits", *tiny, "--run", run]) == 0
    found = sltt.load(run)
    assert found.features[2].tau == 3.0
    assert found.trained.classes == 10
    card = (tmp_path / "run" / "card.md").read_text()
    for part in ("DigitsNet", "SLTT() at T = 4", "split 5012bf79b0e0", "E_ops, nJ", "test accuracy |", "PyTorch"):
        assert part in card
    assert "not measured" not in card


def test_the_energy_of_the_card_is_the_mean_of_held_out_samples(tmp_path):
    class Augmented(torch.utils.data.Dataset):
        def __len__(self):
            return 60

        def __getitem__(self, i):
            return 3 * torch.randn(4), i % 3

    held_out = [(torch.full((4,), i / 4), i % 3) for i in range(12)]
    energies = []
    for resume in (False, True):
        data = sltt.data.from_datasets(Augmented(), held_out, static=True)
        model = nn.Sequential(nn.Linear(4, 64), sltt.LIF(), nn.Linear(64, 3))
        train(tmp_path / "run", model, data, epochs=1, steps=4, resume=resume)
        energies += [(tmp_path / "run" / "card.md").read_text().partition("| of one sample |")[2]]
    assert energies[0] == energies[1]
    energy = sltt.analysis.measure_energy(model, torch.stack([x for x, _ in held_out]), steps=4)
    assert energies[0].partition("| firing rate |")[2].split()[0] == f"{energy.rate:.3g}"


def test_a_run_without_its_settings_is_loaded_with_a_network_only(tmp_path):
    model, result = train(tmp_path / "run", epochs=1)
    (result.run / "config.yaml").unlink()
    with pytest.raises(ValueError, match="does not keep its network: make it"):
        sltt.load(result.run)
    assert equal(sltt.load(result.run, network()).state_dict(), model.state_dict())


def test_a_run_of_other_code_is_noticed(tmp_path, caplog, monkeypatch):
    def own(text):
        (tmp_path / "net.py").write_text(f"from torch import nn\nclass Net(nn.Sequential):\n    {text}\n")
        sys.modules.pop("net", None)
        importlib.invalidate_caches()
        return importlib.import_module("net").Net(*network())

    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    _, result = train(tmp_path / "run", model=own("def forward(self, x): return super().forward(x)"), epochs=1)
    sltt.load(result.run, own("def forward(self, x): return (super().forward(x))  # the same"))
    assert not caplog.messages
    sltt.load(result.run, own("def forward(self, x): return super().forward(x * 2)"))
    assert "was trained with other layers: the code of Net was" in caplog.text


def test_a_run_of_other_neurons_is_noticed(tmp_path, caplog):
    def network(neuron):
        return nn.Sequential(nn.Linear(64, 16), neuron, sltt.PLIF(), nn.Linear(16, 10))

    model, settings = network(sltt.LIF(tau=2.0)), {"steps": 2, "epochs": 1, "device": "cpu", "run": tmp_path / "run"}
    data = sltt.data.from_datasets([(torch.rand(64), i % 10) for i in range(40)], static=True)
    sltt.fit(model, data, **settings)
    sltt.load(tmp_path / "run", network(sltt.LIF(tau=2.0)))
    sltt.fit(model, data, **settings | {"epochs": 2}, resume=True)  # of learned time constants
    assert not caplog.messages
    sltt.load(tmp_path / "run", network(sltt.IF()))
    assert "was trained with other layers: 1 was LIF(tau=2.0, v_threshold=1.0" in caplog.text
    other = nn.Sequential(*network(sltt.LIF(tau=2.0))[:3], nn.Linear(16, 5))
    with pytest.raises(ValueError, match=r"size mismatch for 3.weight"):
        sltt.load(tmp_path / "run", other)
    with pytest.raises(ValueError, match=r"no weights in .*ckpt have the name and shape of weights"):
        sltt.load(tmp_path / "run", nn.Sequential(nn.Linear(9, 9)), strict=False)
    nn.init.zeros_(other[0].weight)
    sltt.load(tmp_path / "run", other, strict=False)
    assert torch.equal(other[0].weight, model[0].weight)
    caplog.clear()
    nn.init.zeros_(other[0].weight)
    few = sltt.data.from_datasets([(torch.rand(64), i % 5) for i in range(40)], static=True)
    sltt.fit(other, few, weights=str(tmp_path / "run"), strict=False, **settings | {"run": tmp_path / "other"})
    assert "no weights of the same name and shape for 3.bias, 3.weight" in caplog.text
    assert other[0].weight.sub(model[0].weight).abs().max() < 0.1 < model[0].weight.abs().max()
    with pytest.raises(ValueError, match=r"layers: 1 was LIF\(tau=2.0, .* and is LIF\(tau=3.0, "):
        sltt.fit(network(sltt.LIF(tau=3.0)), data, **settings | {"epochs": 3}, resume=True)


def test_constants_of_neurons_that_learn_are_told_and_what_they_learn_is_not():
    first, same, other = (describe_layers(nn.Sequential(sltt.PLIF(*v))) for v in ((2.0, 1), (3.0, 1), (2.0, 2)))
    assert first == same != other
