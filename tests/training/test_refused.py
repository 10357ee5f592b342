"""What a training refuses before its first epoch ends."""

from functools import partial

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

import sltt
from sltt.callbacks import EarlyStopping
from sltt.data import Splits
from sltt.training.phases import Phase
from tests.training.blobs import Blobs, network, train
from tests.training.test_phases import Pictures


class Empty(Blobs):
    def load(self, steps):
        return Splits([], None, [], True, 3, "empty")


class Scaled(nn.CrossEntropyLoss):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))


class Csv:
    """A logger that was not made."""

    log_metrics = log_hyperparams = save = finalize = print


def loss(logits, target):
    return nn.functional.cross_entropy(logits, target)


HARD = network()
HARD[2] = sltt.LIF(v_reset=0.0)
SUM = nn.CrossEntropyLoss(reduction="sum")
ONE = "BatchNorm needs two"
REFUSED = [
    ({"callbacks": [EarlyStopping]}, "callbacks"),
    ({"callbacks": EarlyStopping()}, "callbacks"),
    ({"data": Blobs(validation=0), "callbacks": [EarlyStopping()]}, "EarlyStopping needs validation samples: hold"),
    ({"data": Empty()}, "there are no test samples"),
    ({"batch_size": 1, "phases": [Phase(1, batches=1)]}, ONE),
    ({"batch_size": 59, "phases": [Phase(1, batches=2)]}, ONE),
    ({"graph": "on"}, "graph='on' needs a CUDA device, and this is cpu: leave graph out"),
    ({"loggers": ["CSV"]}, r"loggers\[0\] must be a Logger, got 'CSV'; such as lightning_fabric"),
    ({"loggers": [Csv]}, r"loggers\[0\] must be a Logger, got .*call it: Csv\(\)"),
    ({"rule": sltt.OTTT(online=True), "accumulate": 2}, r"OTTT\(online=True\) updates .*, accumulate once a batch"),
    ({"loss": Scaled()}, "the loss has parameters, which are not trained: give them to the network"),
    ({"loss": partial(nn.functional.cross_entropy, reduction="sum"), "accumulate": 2}, "reduction='sum' adds up"),
    ({"loss": SUM, "accumulate": 2}, "a loss with reduction='sum' adds up over samples"),
    ({"loss": sltt.losses.PerStep(SUM), "accumulate": 2}, "a loss with reduction='sum' adds up over samples"),
    ({"accumulate": 0}, "accumulate must be at least 1, got 0"),
    ({"model": nn.Linear(4, 3), "norm_weight_decay": 0.0}, "norm_weight_decay with weights"),
    ({"model": nn.RMSNorm(4), "norm_bias_lr": 2.0}, "norm_bias_lr needs normalisation with a bias"),
    ({"data": Pictures(), "phases": [Phase(1, crop=11)]}, "a phase crops 11 pixels out of samples"),
    ({"phases": [Phase(3), Phase(1, crop=2)]}, "a phase crops 2 pixels out of samples"),
    ({"phases": [Phase(3), Phase(1, rule=sltt.SLTT(k=5))]}, "trains 5 steps, but the sequence has T = 4; use k ≤ T"),
    ({"model": HARD, "phases": [Phase(3), Phase(1, rule=sltt.OTTT())]}, r"2 \(LIF\) resets to v_reset = 0.0"),
    ({"phases": [Phase(4, steps=2)]}, "the last phase trains T = 2, and steps=4 is evaluated"),
    ({"quantised": "int4"}, "quantised must be one of 'int8', got 'int4'"),
    ({"quantised": "int8", "ema": 0.9}, "leave one out"),
    ({"quantised": "int8", "rule": sltt.OTTT(online=True)}, "updates them in it"),
    ({"metric": loss}, "the metric is called loss, as what is trained: give its function another"),
]


@pytest.mark.parametrize(("settings", "message"), REFUSED, ids=range(len(REFUSED)))
def test_settings_that_do_not_fit_are_refused_before_a_training(settings, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        train(tmp_path / "run", **settings)
    assert not list(tmp_path.rglob("*.ckpt"))


@pytest.mark.parametrize("size", [59, 1])
def test_a_batch_of_one_sample_is_refused_with_a_size_that_trains(size, tmp_path):
    with pytest.raises(ValueError, match=f"with batch_size={size}, and BatchNorm needs two: set batch_size=") as caught:
        train(tmp_path / "run", batch_size=size)
    train(tmp_path / "run", batch_size=int(str(caught.value).rpartition("=")[2]), epochs=1)


SAMPLES = {
    "shape": (torch.rand(8, 1, 9, 9), r"\[1, 9, 9\] of torch.float32; training samples are \[1, 8, 8\] of torch"),
    "double": (torch.rand(8, 1, 8, 8).double(), r"\[1, 8, 8\] of torch.float64; .*: mat1 and mat2 must have the same"),
    "whole": (torch.randint(9, (8, 1, 8, 8)), r"\[1, 8, 8\] of torch.int64; "),
}


@pytest.mark.parametrize(("x", "message"), SAMPLES.values(), ids=SAMPLES)
def test_samples_that_the_network_does_not_take_are_named_before_an_epoch(x, message):
    plain, other = (TensorDataset(one, torch.arange(8) % 3) for one in (torch.rand(8, 1, 8, 8), x))
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 4), sltt.LIF(), nn.Linear(4, 3))
    data = sltt.data.from_datasets(plain, other, static=True)
    with pytest.raises(ValueError, match="takes no validation samples " + message):
        sltt.fit(model, data, sltt.SLTT(), nn.CrossEntropyLoss(), steps=2)
