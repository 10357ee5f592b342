"""Trainings whose layers run sparse on spikes."""

from functools import partial

import pytest
import torch
from torch import nn

import sltt
from sltt.callbacks import Callback
from sltt.training import session
from sltt.training.checkpoints import load_checkpoint, load_weights
from sltt.training.console import Console
from tests.kernels.exact import NATIVE
from tests.training.blobs import Images, equal, rows, stop_at, train, weights

pytestmark = NATIVE
SGD = partial(torch.optim.SGD, lr=0.05, momentum=0.9)


def network():
    torch.manual_seed(0)
    first = nn.Conv2d(2, 16, 3, padding=1), nn.BatchNorm2d(16), sltt.LIF()
    second = nn.Conv2d(16, 24, 3, padding=1), nn.BatchNorm2d(24), sltt.LIF(), sltt.Dropout(0.1)
    return nn.Sequential(*first, *second, nn.Conv2d(24, 16, 3), nn.Flatten(), nn.Linear(576, 3))


def trained(run, model=None, **kwargs):
    settings = {"optimizer": SGD, "channels_last": True, "sparse": "on", **kwargs}
    return train(run, model or network(), Images(), **settings)


@pytest.mark.parametrize(("batch", "k"), [(3, 2), (6, None)])
def test_a_resumed_run_ends_with_the_same_bits(batch, k, sparse_calls, tmp_path):
    whole, result = trained(tmp_path / "whole", rule=sltt.SLTT(k=k), epochs=2)
    assert {kind for kind, _ in sparse_calls} == {"forward", "grad"}
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path / "part", rule=stop_at(batch, k), epochs=2)
    progress = load_checkpoint(tmp_path / "part" / "last.ckpt")["progress"]
    assert (progress["epoch"], progress["batch"]) == divmod(batch, 4)
    resumed, again = trained(tmp_path / "part", rule=sltt.SLTT(k=k), epochs=2, resume=True)
    assert equal(weights(tmp_path / "part" / "last.ckpt"), weights(tmp_path / "whole" / "last.ckpt"))
    assert equal(resumed.state_dict(), whole.state_dict())
    assert rows(again) == rows(result)


class Viewed(nn.Module):
    """Flattens as many networks do, which fails with the channels last."""

    def forward(self, x):
        return x.view(len(x), -1)


SEEN = []


class Sees(nn.Module):
    """Notes whether images have the channels last, in a global: an attribute that changes means another trial."""

    def forward(self, x):
        SEEN.append(x.is_contiguous(memory_format=torch.channels_last))
        return x


@pytest.mark.parametrize(
    ("flatten", "asked", "last"),
    [(nn.Flatten(), None, True), (Viewed(), None, False), (nn.Flatten(), False, False)],
    ids=["auto", "not with view", "off"],
)
def test_a_gpu_gets_networks_and_images_channels_last_unless_they_fail_so(flatten, asked, last, monkeypatch, tmp_path):
    monkeypatch.setattr(session, "prefers_channels_last", lambda device: True)
    report, lines, results = Console(quiet=True), [], []
    report.line = lines.append
    for name, given in (("run", asked), *([("expected", last)] if asked is not last else [])):
        model = nn.Sequential(Sees(), *network())
        model[-2] = flatten
        trained(tmp_path / name, model, channels_last=given, sparse="off", steps=1, report=report, epochs=1)
        assert SEEN[-1] is last
        assert model[1].weight.is_contiguous() is not last
        SEEN.clear()
        sltt.evaluate(model, Images(), channels_last=given, sparse="off", steps=1, device="cpu")
        assert SEEN[-1] is last
        results.append(model.state_dict())
    assert sum("channels-last" in line for line in lines) == last
    assert equal(results[0], results[-1])
    model = nn.Sequential(Sees(), *network())  # the weights are loaded in any format
    load_weights(model, weights(tmp_path / "run" / "last.ckpt"), tmp_path)
    assert model[1].weight.is_contiguous()


class Saved(Callback):
    """What the checkpoint of each epoch holds."""

    def __init__(self, run):
        self.run, self.kept = run, []

    def on_epoch(self, now):
        self.kept.append(load_checkpoint(self.run / "last.ckpt"))


def test_averaged_weights_are_those_of_dense_layers_and_are_read_in_each_evaluation(sparse_calls, tmp_path):
    def averaged(sparse):
        run = tmp_path / sparse
        return *trained(run, ema=0.8, sparse=sparse, callbacks=[saved := Saved(run)], epochs=2), saved.kept

    def loss(state):
        model = network()
        model.load_state_dict(state)
        return sltt.evaluate(model, Images(), "validation", channels_last=True, sparse="off", device="cpu").loss

    (dense, _, _), (model, result, kept) = averaged("off"), averaged("on")
    assert sparse_calls
    torch.testing.assert_close(model.state_dict(), dense.state_dict(), rtol=1e-3, atol=1e-4)
    losses = [row["validation_loss"] for row in result.history]
    assert [loss(checkpoint["averaged"]) for checkpoint in kept] == pytest.approx(losses, rel=1e-3)
    # in a single epoch, the loss of the weights themselves may be the same by chance
    assert [loss(checkpoint["model"]) for checkpoint in kept] != pytest.approx(losses, rel=1e-2)
