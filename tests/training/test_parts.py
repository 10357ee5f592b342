import copy

import pytest
import torch
from torch import nn

import sltt
from sltt.training.batches import count_parts, cut, join_outputs, share
from tests.conftest import LOSS, batch, each_kind, gradient, small_network
from tests.training.blobs import Blobs, network, train, weights


@each_kind
@pytest.mark.parametrize(("count", "per_step"), [(2, True), (3, False)])
def test_parts_add_up_to_the_gradient_of_the_batch(rule, count, per_step):
    if per_step and isinstance(rule, sltt.RateBased):
        pytest.skip("RateBased has no targets of each step")
    loss = sltt.losses.PerStep(LOSS) if per_step else LOSS
    x, y = batch(size=7)
    y = torch.randint(3, (len(x), 7)) if per_step else y
    network, found = small_network(), []
    for parts in (1, count):
        model = copy.deepcopy(network)

        def run(x, y, weight, model=model):
            return rule(model, x, y, loss, backward=lambda value: (value * weight).backward(), seed=3)

        torch.manual_seed(1)
        split = cut(x, y, parts, static=False, per_step=per_step)
        out = join_outputs([run(*part) for part in split], split)
        found.append((gradient(model), out.loss, out.logits))
    for one, whole in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(one, whole)


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_a_part_has_two_samples_in_every_process(processes):
    for size in range(1, 20):
        parts = count_parts(4, size, processes)
        own = [share(size, rank, processes)[1] for rank in range(processes)]
        own = [size] * processes if size < 2 * processes else own
        assert all(parts == 1 or n // parts >= 2 for n in own), size
        assert parts == 4 or min(own) < 8, size


def plain():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 16), sltt.LIF(), nn.Linear(16, 3)).double()


@pytest.mark.parametrize("static", [True, False])
def test_a_training_in_parts_has_the_weights_of_one_in_batches(static, tmp_path):
    class Doubles(Blobs):
        def load(self, steps):
            splits = super().load(steps)
            for part in (splits.train, splits.validation, splits.test):
                part[:] = [(x.double(), y) for x, y in part]
            return splits

    found = []
    for parts in (1, 3):
        settings = {"rule": sltt.SLTT(k=2 if static else 1), "accumulate": parts, "epochs": 1, "clip_norm": 1.0}
        _, result = train(tmp_path / str(parts), plain(), Doubles(static=static), **settings)
        found.append((weights(result.run / "last.ckpt"), result.history[-1]))
    for name, value in found[0][0].items():
        torch.testing.assert_close(found[1][0][name], value, rtol=0, atol=1e-9)
    for key in ("train_loss", "train_accuracy", "firing_rate"):
        assert found[1][1][key] == pytest.approx(found[0][1][key], abs=1e-9)


def test_parts_take_the_memory_of_a_part(tmp_path):
    peaks = []
    for parts in (1, 4):
        model = nn.Sequential(nn.Linear(4, 2048), sltt.LIF(), nn.Linear(2048, 3))
        _, result = train(tmp_path / str(parts), model, batch_size=32, accumulate=parts, epochs=1)
        peaks.append(result.history[0]["peak_memory"])
    assert peaks[1] < 0.6 * peaks[0]


def test_normalisation_takes_parts_and_the_last_batch_of_one_epoch(tmp_path):
    _, result = train(tmp_path / "run", network(), accumulate=8, batch_size=29, epochs=1)  # parts of 3, and 2 samples
    assert result.history[0]["train_loss"] > 0
