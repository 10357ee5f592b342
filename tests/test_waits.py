"""What CUDA needs of the rules, shown without a device as far as that goes; test_cuda.py needs one.

`Waits` records the operations at which a host waits for a device. On the meta device, whose tensors have no values,
nothing can be read in another way either; but spikes are not saved as bits there. So they are on the CPU, whose tensors
then say that they are elsewhere, so that nobody looks at spikes; but an input is looked at. What CUDA's own kernels
wait for is seen on a CUDA device only.
"""

import contextlib
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import sltt
from sltt.analysis import firing_rates
from sltt.kernels.neuron import step
from sltt.kernels.spikes.looks import PACK_FROM
from sltt.sequence.run import Run
from sltt.sequence.steps import Sequence, time_steps
from tests.conftest import KINDS, LOSS, RULES, batch, each_kind, small_network

DOCS = (Path(sltt.__file__).parents[1] / "docs" / "gpu.md").read_text()
CAPTURE, COMPILE = re.findall(r"```python\n(.*?)```", DOCS, re.DOTALL)
aten = torch.ops.aten

VALUES = {aten._local_scalar_dense, aten.equal, aten.allclose}
# of a size that hangs on values
SIZED = {aten.nonzero, aten.masked_select, aten._unique2, aten.unique_dim, aten.repeat_interleave}
HOST_DATA = {aten.lift_fresh}  # torch.tensor(…): made on the host, and copied from there
INDEXING = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_}
COPIES = {aten._to_copy, aten.copy_}


class Waits(TorchDispatchMode):
    """Records the operations at which the host waits for a device."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, kind = kwargs or {}, func.overloadpacket
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        devices = {t.device for t in tensors} | {kwargs.get("device") or tensors[0].device} if kind in COPIES else ()
        if (
            kind in VALUES | SIZED | HOST_DATA
            or len(devices) > 1
            or (kind in INDEXING and any(t.dtype == torch.bool for t in tree_leaves(args[1]) if t is not None))
        ):
            self.seen.append(str(kind))
        if kind is aten._local_scalar_dense and args[0].is_meta:
            return True  # so that the rule goes on
        return func(*args, **kwargs)


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize(
    "lesion",
    [
        lambda x: x.sum().item(),
        lambda x: bool(x.sum() > 0),
        lambda x: torch.equal(x, x),
        lambda x: torch.allclose(x, x),
        lambda x: x.nonzero(),
        lambda x: x[x > 0],
        lambda x: x.new_zeros(3).masked_select(x > 0),
    ],
    ids=["item", "bool", "equal", "allclose", "nonzero", "mask", "select"],
)
def test_what_waits_is_seen(lesion, device):
    # on meta some operations have no form without values
    with Waits() as waits, contextlib.suppress(*[NotImplementedError, RuntimeError] * (device == "meta")):
        lesion(torch.ones(3, device=device))
    assert waits.seen


def test_data_of_the_host_is_seen():
    with Waits() as waits:
        torch.ones(3).to("meta")
        torch.ones(3, device="meta").copy_(torch.ones(3))
        torch.tensor([1.0, 2.0])  # here on the CPU, where it is made in any case
        torch.ones(3).to(torch.float64).copy_(torch.ones(3))
    assert waits.seen == ["aten._to_copy", "aten.copy_", "aten.lift_fresh"]


def waits_of(rule, model, x, y, loss, steps=3):
    for _ in range(2):  # the first batch makes what is made once
        with Waits() as waits, firing_rates(model):
            rule(model, x, y, loss, steps=steps)
    return waits.seen


class Doubles(TorchDispatchMode):
    """Records the operations that give float64, which Apple's GPUs do not have."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if any(isinstance(leaf, Tensor) and leaf.dtype == torch.float64 for leaf in tree_leaves(out)):
            self.seen.append(str(func))
        return out


def reads_of(rule):
    """How often a rule looks at what it computed: not at all, or once a sequence whether a replay was the same."""
    return ["aten._local_scalar_dense"] * ("segment=2" in repr(rule))


def test_no_rule_waits_for_the_device_or_needs_float64(rule):
    even = [*RULES.values()].index(rule) % 2 == 0  # each family has rules of both kinds
    neurons = iter([sltt.LIF, sltt.CubaLIF] if even else [sltt.PLIF, sltt.ALIF])
    model = small_network(lambda: next(neurons)(), norm=True, dropout=0.2).to("meta", torch.float32)
    x, y = torch.empty(4, 6, device="meta"), torch.empty(4, dtype=torch.long, device="meta")
    loss = sltt.losses.CrossEntropyMSE(one_hot=True)
    with Doubles() as doubles, firing_rates(model):
        with Waits():  # what is made once
            rule(model, x.expand(3, 4, 6), y, loss)
        with Waits() as waits:
            rule(model, x, y, loss, steps=3)
    assert waits.seen == reads_of(rule)
    assert doubles.seen == []


@pytest.mark.parametrize("name", [name for name in KINDS if RULES[name].pads])
def test_lengths_of_a_batch_are_copied_to_the_device_at_once(name):
    model = small_network().to("meta")
    x, y = torch.empty(3, 4, 6, device="meta", dtype=torch.float64), torch.empty(4, dtype=torch.long, device="meta")
    for lengths in ([3, 2, 3, 1], [3] * 4):
        seen = waits_of(RULES[name], model, x, sltt.Padded(y, lengths), F.cross_entropy, None)
        # the others are on the host
        assert sum(seen.count(str(kind)) for kind in COPIES | INDEXING) == 1


class Foreign(nn.Module):
    """A neuron of another library, whose λ is a tensor."""

    def __init__(self):
        super().__init__()
        self.register_buffer("kept", torch.tensor(0.5))
        self.v = None

    def forward(self, x):
        self.v = x if self.v is None else self.kept * self.v + x
        return torch.sigmoid(self.v)


def test_the_trace_of_another_librarys_neurons_does_not_wait_either():
    sltt.register(Foreign, states=["v"], decay=lambda neuron: neuron.kept)
    model = nn.Sequential(nn.Linear(6, 8), Foreign(), nn.Linear(8, 3)).to("meta")
    x, y = torch.empty(4, 6, device="meta"), torch.empty(4, dtype=torch.long, device="meta")
    assert waits_of(sltt.OTTT(), model, x, y, sltt.losses.CrossEntropyMSE(one_hot=True)) == []


@each_kind
def test_no_time_step_waits_where_spikes_are_saved_as_bits(rule, elsewhere, monkeypatch):
    tagged, tag = [], step.tag_spikes
    monkeypatch.setattr(step, "tag_spikes", lambda *a: (tagged.append(1), tag(*a))[1])
    model = sltt.models.DigitsNet(width=16, dropout=0.2)
    x, y = torch.randn(4, 1, 8, 8), torch.randint(10, (4,))
    assert PACK_FROM <= 4 * 16 * 64
    # the loss without its look at labels on the CPU; the two reads more are the looks at the input and at what came out
    reads = ["aten._local_scalar_dense"] * (1 if isinstance(rule, sltt.RateBased) else 2)  # that has no states left
    assert waits_of(rule, model, x, y, F.cross_entropy) == reads + reads_of(rule)
    assert tagged or not isinstance(rule, sltt.BPTT | sltt.TBPTT)  # graphs of one step keep small spikes


def test_an_input_that_nobody_looks_at_gives_nan_where_it_is_damaged():
    sequence = time_steps(torch.empty(3, 2, 4, device="meta"), None)
    assert len(sequence.bounds) == 2
    assert not time_steps(torch.zeros(3, 2, 4), None).bounds
    assert not time_steps(torch.empty(3, 2, 4, dtype=torch.uint8, device="meta"), None).bounds
    for bound in (1.0, torch.inf, torch.nan):
        run = Run(nn.Sequential(sltt.LIF()), Sequence(torch.ones(1), 1, True, (torch.tensor(bound),)), sltt.Step())
        assert run.result(torch.ones(2))[0].isnan().tolist() == [bound != 1] * 2


def test_a_graph_of_one_draw_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(ValueError, match=r"SLTT\(k=2\) draws its steps for each batch: capture SLTT\(\)"):
        sltt.SLTT(k=2)(small_network(), *batch(), LOSS)
    sltt.SLTT()(small_network(), *batch(), LOSS)


def example(device, rule=sltt.SLTT()):
    """What the examples of the documentation take for granted; in float64, so that no spike flips."""
    torch.manual_seed(0)
    model = sltt.models.DigitsNet(width=8).double().to(device)
    loader = [(torch.randn(3, 16, 1, 8, 8, dtype=torch.float64), torch.randint(10, (16,))) for _ in range(3)]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    known = {"torch": torch, "sltt": sltt, "device": device, "loss": LOSS, "rule": rule}
    return {**known, "model": model, "loader": loader, "optimizer": optimizer}


def train(model, optimizer, loader, loss, rule, device, **_):
    """What the examples do, without graphs."""
    for x, y in loader:
        optimizer.zero_grad()
        rule(model, x.to(device), y.to(device), loss)
        optimizer.step()
    return model


def assert_same_weights_and_gradients(model, expected):
    for got, want in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(got, want)
        torch.testing.assert_close(got.grad, want.grad)


@pytest.mark.slow
@pytest.mark.parametrize("device", ["cpu"] + ["cuda"] * torch.cuda.is_available())
def test_a_model_compiled_to_graphs_of_each_call_trains_as_without(device):
    names = example(device)
    exec(compile(COMPILE, "gpu.md", "exec"), names)
    assert_same_weights_and_gradients(names["model"], train(**example(device)))
