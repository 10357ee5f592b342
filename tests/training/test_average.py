import pytest
import torch
from torch import nn

import sltt
from sltt.callbacks import Callback
from sltt.training.phases import Phase
from sltt.training.runs import new_run
from tests.training.blobs import Blobs, averaged, equal, network, train, weights

DECAY = 0.8


class Reference(Callback):
    """The average by its equation."""

    def __init__(self, model):
        self.mean, self.step = {k: v.detach().clone().double() for k, v in model.state_dict().items()}, 0

    def on_batch(self, now):
        self.step += 1
        decay = min(DECAY, self.step / (self.step + 9))
        for name, value in now.model.state_dict().items():
            self.mean[name] = decay * self.mean[name] + (1 - decay) * value.double()


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_average_is_that_of_the_equation_statistics_too(accumulate, tmp_path):
    model = network()
    reference = Reference(model)
    settings = {"ema": DECAY, "callbacks": [reference], "accumulate": accumulate, "epochs": 2}
    trained, result = train(tmp_path / "run", model, Blobs(0), **settings)
    found = averaged(result.run / "last.ckpt")
    for name, value in found.items():
        if value.is_floating_point():
            torch.testing.assert_close(value.double(), reference.mean[name], rtol=1e-4, atol=1e-5)
    assert equal(trained.state_dict(), found)
    assert not equal(weights(result.run / "last.ckpt"), found)


def test_the_average_is_validated_selected_loaded_and_said(tmp_path):
    model, result = train(tmp_path / "run", ema=DECAY)
    row = result.history[result.epoch - 1]
    assert sltt.evaluate(model, Blobs(), "validation", device="cpu").loss == pytest.approx(row["validation_loss"])
    assert equal(model.state_dict(), averaged(result.run / "best.ckpt"))
    loaded = sltt.load(result.run, network())
    assert equal(loaded.state_dict(), model.state_dict())
    started, _ = train(tmp_path / "next", weights=str(result.run), epochs=1, optimizer=still)
    torch.testing.assert_close(started[0].weight, model[0].weight)
    assert "| weights | exponential moving average, decay 0.8 |" in (result.run / "card.md").read_text()


def still(parameters):
    return torch.optim.SGD(parameters, lr=0.0)


def test_training_itself_is_as_without_an_average(tmp_path):
    for name, ema in (("with", DECAY), ("without", None)):
        train(tmp_path / name, ema=ema, epochs=2)
    assert equal(weights(tmp_path / "with" / "last.ckpt"), weights(tmp_path / "without" / "last.ckpt"))


@pytest.mark.parametrize("lr", [0.0, None])
def test_a_phase_with_a_rate_of_its_own_goes_on_from_the_average(lr, tmp_path):
    phases = [Phase(1), Phase(1, lr=lr, freeze_norm=True)]
    _, first = train(tmp_path / "first", ema=DECAY, epochs=1, phases=phases[:1])
    _, both = train(tmp_path / "both", ema=DECAY, epochs=2, phases=phases)
    found, before = weights(both.run / "last.ckpt"), averaged(first.run / "last.ckpt")
    same = [torch.allclose(found[name], before[name], rtol=1e-5) for name in before if "num_batches" not in name]
    assert all(same) if lr == 0 else not any(same)


def test_a_run_without_a_checkpoint_averages_from_the_weights_that_it_was_to_start_from(tmp_path):
    settings = {"ema": DECAY, "epochs": 1}
    train(tmp_path / "first", **settings)
    model, _ = train(tmp_path / "whole", weights=str(tmp_path / "first"), **settings)
    new_run(tmp_path / "part", "run", {})
    resumed, _ = train(tmp_path / "part", weights=str(tmp_path / "first"), resume=True, **settings)
    assert equal(resumed.state_dict(), model.state_dict())


class Table(nn.Module):
    """Reads its input through an index and a mask."""

    def __init__(self):
        super().__init__()
        self.register_buffer("index", torch.arange(3, -1, -1))
        self.register_buffer("mask", torch.tensor([0.0, -torch.inf]))

    def forward(self, x):
        return x[:, self.index] * self.mask.softmax(0)[0]


def test_an_index_and_a_mask_are_copied(tmp_path):
    model, _ = train(tmp_path / "run", nn.Sequential(Table(), *network()), ema=DECAY, epochs=1)
    assert model[0].index.tolist() == [3, 2, 1, 0]
    assert model[0].mask.tolist() == [0.0, -torch.inf]
