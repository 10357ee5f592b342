"""Two processes whose layers run sparse on spikes: the gradients and weights of one.

torchrun --standalone --nproc_per_node 2 -m tests.parallel.test_sparse FOLDER
"""

import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import sltt
from sltt import kernels
from sltt.kernels.layers import sparse
from tests.conftest import LOSS
from tests.kernels.exact import NATIVE
from tests.parallel.test_distributed import ROOT, start, weights
from tests.processes import train
from tests.training.blobs import Images

pytestmark = [pytest.mark.slow, NATIVE]
RULES = {"BPTT": sltt.BPTT(), "SLTT": sltt.SLTT()}


class ChannelsLast(nn.Module):
    """The images in this memory format."""

    def forward(self, x):
        return x.contiguous(memory_format=torch.channels_last)


def network():
    torch.manual_seed(0)
    layers = ChannelsLast(), nn.Conv2d(2, 32, 3, padding=1), sltt.LIF(tau=1.5), nn.Conv2d(32, 32, 3), sltt.LIF(tau=1.5)
    layers[3].weight.data.mul_(4)  # so that the second neuron fires too
    return nn.Sequential(*layers, nn.Conv2d(32, 16, 3), nn.Flatten(), nn.Linear(256, 3))


def sharded(model):
    """Each layer by itself; gradients are divided after the sum, as gloo does not by itself."""
    mesh = dist.init_device_mesh("cpu", (2,))
    for layer in [m for m in model if [*m.parameters()]] + [model]:
        fully_shard(layer, mesh=mesh).set_force_sum_reduction_for_comms(True)
    return model


WRAPPERS = {"data parallel": DistributedDataParallel, "sharded": sharded}


def gradients(rule, samples, wrap=lambda model: model):
    """Those of the mean loss over some of 16 images."""
    torch.manual_seed(1)
    x, y = 3 * torch.randn(16, 2, 8, 8), torch.arange(16) % 3
    model = wrap(network())
    with kernels.using(sparse="on"):
        rule(model, x[samples], y[samples], LOSS, steps=3)
    return [p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad for p in model.parameters()]


def trained(run):
    train(run, network(), Images(), sparse="on", batch_size=16, channels_last=True)


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    forward, ran = sparse.forward, []
    sparse.forward = lambda *a: (ran.append(a[0]), forward(*a))[1]
    trained(folder / "run")
    assert ran
    rank = dist.get_rank()
    half = slice(8 * rank, 8 * rank + 8)
    for name, wrap in WRAPPERS.items():
        ran.clear()
        found = {key: gradients(rule, half, wrap) for key, rule in RULES.items()}
        calls = 3 if name == "sharded" else 1  # of three time steps: sharded weights are not copied, so not tried
        assert len(ran) == 2 * calls * len(RULES)  # two layers
        torch.save(found, folder / f"{name} {rank}.pt")


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    process = start([*command, "-m", "tests.parallel.test_sparse", str(folder)], cwd=ROOT)
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 0, out
    return folder


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("rule", RULES)
def test_gradients_of_two_processes_are_those_of_the_whole_batch(rule, wrapper, two):
    expected = gradients(RULES[rule], slice(16))
    for rank in range(2):
        found = torch.load(two / f"{wrapper} {rank}.pt")[rule]
        for one, other in zip(found, expected, strict=True):
            assert (one - other).norm() <= 1e-5 * other.norm()


def test_two_processes_train_to_the_weights_of_one(two, tmp_path):
    trained(tmp_path / "run")
    torch.testing.assert_close(weights(two / "run"), weights(tmp_path / "run"), rtol=1e-4, atol=1e-5)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
