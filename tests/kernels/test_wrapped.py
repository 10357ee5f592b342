"""Layers on spikes in a network that is pickled, wrapped, sharded or compiled: the gradients of dense layers."""

import contextlib
import copy
import pickle

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import sltt
from sltt import kernels
from sltt.kernels import native
from sltt.kernels.layers import layers
from tests.references import recorded

pytestmark = pytest.mark.skipif(native.problem() is not None, reason=str(native.problem()))


@pytest.fixture(scope="module")
def alone():
    """A group of one process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def network():
    torch.manual_seed(0)
    first = nn.Conv2d(2, 32, 3, padding=1), nn.MaxPool2d(1), sltt.LIF(tau=1.5)  # which the rule runs once a sequence
    return nn.Sequential(*first, nn.Conv2d(32, 32, 3), sltt.LIF(tau=1.5), nn.Flatten(), nn.Linear(32 * 16, 5))


def batch():
    x = 2 * torch.randn(12, 2, 6, 6).contiguous(memory_format=torch.channels_last)
    return x, torch.arange(12) % 5


def trained(model, x, y, sparse):
    """The gradients that a batch leaves, of weights in one piece."""
    with kernels.using(sparse=sparse, compile="off"):
        sltt.SLTT(fold=1)(model, x, y, nn.CrossEntropyLoss(), steps=3)
    grads = [p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad for p in model.parameters()]
    model.zero_grad()
    return grads


@pytest.fixture
def forwards(monkeypatch):
    """Weights' shapes of the layers whose forward ran sparse."""
    return recorded(monkeypatch, layers.sparse, "forward", lambda layer, *_: layer.weight_shape)


def pickled(model):
    model(batch()[0])  # with states
    return pickle.loads(pickle.dumps(model))


def sharded(model):
    mesh = dist.init_device_mesh("cpu", (1,))
    for conv in (model[0], model[3]):
        fully_shard(conv, mesh=mesh)
    return fully_shard(model, mesh=mesh)


KINDS = {"pickled": pickled, "data parallel": DistributedDataParallel, "sharded": sharded}


@pytest.mark.parametrize("change", KINDS.values(), ids=KINDS.keys())
def test_gradients_are_those_of_the_dense_network(change, alone, forwards):
    x, y = batch()
    expected = trained(network(), x, y, "off")
    assert not forwards
    model = change(network())
    for _ in range(2):  # forms of weights are not left over
        found = trained(model, x, y, "on")
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    assert forwards == [(32, 32, 3, 3)] * 3 * 2


class Normed(nn.Module):
    """A BatchNorm and neurons that operations show to be neighbours."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(2, 8, 3), nn.BatchNorm2d(8)
        self.neuron, self.head = sltt.LIF(), nn.Linear(128, 5)

    def forward(self, x):
        return self.head(self.neuron(self.norm(self.conv(x))).flatten(1))


def test_pairs_are_those_of_the_network_that_is_wrapped(alone):
    x, y = batch()
    torch.manual_seed(0)
    model = Normed()
    found = []
    for one in (DistributedDataParallel(copy.deepcopy(model)), model):
        sltt.SLTT()(one, x, y, nn.CrossEntropyLoss(), steps=3)
        found.append([p.grad for p in one.parameters()])
    torch.testing.assert_close(*found)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # the compiler's own
def test_a_compiled_network_has_the_compilers_layers(forwards):
    """The compiler sees dense layers; around it, nothing is left of a tag that would be read as spikes."""
    x, y = batch()
    expected = trained(network(), x, y, "off")
    with contextlib.ExitStack() as stack:
        stack.callback(torch.compiler.reset)
        model = network()
        model.compile(backend="eager")
        torch.testing.assert_close(trained(model, x, y, "on"), expected, rtol=1e-4, atol=1e-6)
    assert not forwards
