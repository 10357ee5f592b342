"""Trainings whose layers run sparse on spikes."""

from functools import partial

import pytest
import torch
from torch import nn

import sltt
from sltt.callbacks import Callback
from sltt.training.checkpoints import load_checkpoint
from tests.kernels.exact import NATIVE
from tests.training.blobs import Images, StopAt, equal, train, weights

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


def measured(result):
    return [{k: v for k, v in row.items() if k not in ("seconds", "peak_memory")} for row in result.history]


@pytest.mark.parametrize("k", [None, 2])
@pytest.mark.parametrize("batch", [3, 6])
def test_a_resumed_run_ends_with_the_same_bits(batch, k, sparse_calls, tmp_path):
    whole, result = trained(tmp_path / "whole", rule=sltt.SLTT(k=k))
    assert {kind for kind, _ in sparse_calls} == {"forward", "grad"}
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path / "part", rule=StopAt(batch, k))
    progress = load_checkpoint(tmp_path / "part" / "last.ckpt")["progress"]
    assert (progress["epoch"], progress["batch"]) == divmod(batch, 4)
    resumed, again = trained(tmp_path / "part", rule=sltt.SLTT(k=k), resume=True)
    assert equal(weights(tmp_path / "part" / "last.ckpt"), weights(tmp_path / "whole" / "last.ckpt"))
    assert equal(resumed.state_dict(), whole.state_dict())
    assert measured(again) == measured(result)


class Saved(Callback):
    """What the checkpoint of each epoch holds."""

    def __init__(self, run):
        self.run, self.kept = run, []

    def on_epoch(self, now):
        self.kept.append(load_checkpoint(self.run / "last.ckpt"))


def test_averaged_weights_are_those_of_dense_layers_and_are_read_in_each_evaluation(sparse_calls, tmp_path):
    def averaged(sparse):
        run = tmp_path / sparse
        return *trained(run, ema=0.8, sparse=sparse, callbacks=[saved := Saved(run)]), saved.kept

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
