"""Networks that are trained and evaluated with sparse layers: the spikes and gradients of dense ones."""

import copy
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest
import torch
from torch import nn

import sltt
from sltt import kernels, models
from sltt.neurons import Neuron
from tests.conftest import LOSS, gradient
from tests.kernels.exact import NATIVE

pytestmark = NATIVE
ROUNDING = 1e-4
NETWORKS = {
    "ResNet": (lambda: models.ResNet((1, 1, 1, 1), in_channels=2, neuron=lambda: sltt.LIF(tau=1.5)), 8),
    "VGG": (lambda: models.VGG(((16, 16), (32, 32), (64,)), in_channels=2, dropout=0.1), 16),
    "DigitsNet": (lambda: models.DigitsNet(in_channels=2), 8),
    "NFResNet": (lambda: models.NFResNet((1, 1, 1, 1), False, 2, neuron=lambda: sltt.LIF(v_threshold=0.4)), 32),
}


def data(size, batch=6):
    x = 2 * torch.randn(2, batch, 2, size, size)
    x = x.flatten(0, 1).contiguous(memory_format=torch.channels_last).unflatten(0, (2, batch))
    return x, torch.arange(batch) % 10


def observed(model, x, y, sparse):
    """Threshold, spikes, and membrane potentials before the reset, of each neuron's calls in a training."""
    torch.manual_seed(0)
    model, seen = copy.deepcopy(model), []

    def look(neuron, _, s):
        seen.append((neuron.v_threshold, s.clone(), (neuron.v + s * neuron.v_threshold).detach()))

    for module in model.modules():
        if isinstance(module, Neuron):
            module.register_forward_hook(look)
        elif isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0  # so that neurons fire in the evaluation
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    with kernels.using(sparse=sparse):
        for _ in range(2):
            optimizer.zero_grad()
            sltt.SLTT()(model, x, y, LOSS)
            optimizer.step()
        sltt.unroll(model.eval(), x)
    return seen


@pytest.mark.parametrize(("network", "size"), NETWORKS.values(), ids=NETWORKS.keys())
def test_spikes_differ_only_where_the_membrane_potential_is_the_threshold_but_for_rounding(network, size, sparse_calls):
    model, (x, y) = network().to(memory_format=torch.channels_last), data(size)
    dense = observed(model, x, y, "off")
    assert not sparse_calls
    sparse = observed(model, x, y, "on")
    assert {kind for kind, _ in sparse_calls} == {"forward", "grad"}
    assert len(dense) == len(sparse)
    assert dense[-1][1].any()  # the last neuron, in the evaluation
    for (threshold, s, u), (_, other, other_u) in zip(dense, sparse, strict=True):
        torch.testing.assert_close(other_u, u, rtol=ROUNDING, atol=ROUNDING)
        differs = s != other
        assert ((u - threshold)[differs].abs() < ROUNDING).all()
        if differs.any():  # what comes behind has read other spikes
            break


@pytest.mark.parametrize("rule", [sltt.SLTT(recompute=True), sltt.BPTT()], ids=repr)
def test_two_threads_that_train_give_the_gradients_of_one_after_the_other(rule, sparse_calls):
    def trained(seed, start=lambda: None):
        model, (x, y) = copy.deepcopy(networks[seed]), batches[seed]
        optimizer, found = torch.optim.SGD(model.parameters(), lr=0.05), []
        start()
        with kernels.using(sparse="on"):
            for _ in range(3):
                optimizer.zero_grad()
                rule(model, x, y, LOSS)
                found.append(gradient(model))
                optimizer.step()
            return [*found, sltt.unroll(model.eval(), x)]

    networks = [models.DigitsNet(2, width=16).to(memory_format=torch.channels_last) for _ in range(2)]
    batches = [data(8, batch=16) for _ in range(2)]
    with ThreadPoolExecutor(1) as one:
        alone = list(one.map(trained, range(2)))
    assert sparse_calls
    for _ in range(2):
        with ThreadPoolExecutor(2) as two:
            together = list(two.map(trained, range(2), [Barrier(2).wait] * 2))
        for found, expected in zip(together, alone, strict=True):
            assert all(map(torch.equal, found, expected))
