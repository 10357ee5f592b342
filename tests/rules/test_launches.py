"""A budget of kernel launches: the operations of a batch of ResNet-18, T = 6, counted on the meta device."""

from collections import Counter
from contextlib import contextmanager, nullcontext
from functools import cache
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import sltt
from sltt.kernels.neuron import step as neuron
from sltt.kernels.neuron import triton_step
from sltt.kernels.norm import normed, triton_norm
from sltt.kernels.options import Kernel

pytest.importorskip("triton")

# views, and allocations
FREE = {
    *("alias", "as_strided", "chunk", "detach", "expand", "permute", "select", "slice", "split", "squeeze", "t"),
    *("transpose", "unbind", "unsqueeze", "view", "_unsafe_view", "_reshape_alias", "lift_fresh", "set_"),
    *("promote_types", "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"),
}


class Launches(TorchDispatchMode):
    """Counts operations by name, without views and allocations."""

    def __init__(self):
        super().__init__()
        self.seen = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name not in FREE:
            # a bias is added by a launch of its own; each gradient of a convolution takes one
            self.seen[name] += sum(args[-1]) if name == "convolution_backward" else 1
            if name == "convolution" and args[2] is not None:
                self.seen["bias"] += 1
        return func(*args, **(kwargs or {}))


@contextmanager
def counting():
    """Count the operations in this block as on a GPU; a kernel, which would be compiled, counts one and is not run."""
    launches, choose = Launches(), triton_step.triton_step

    def launch(self, *arguments, **constants):
        launches.seen["kernel of a neuron"] += 1

    def choose_as_on_cuda(step, like, *types):
        return choose(step, SimpleNamespace(is_cuda=True, device=like.device), *types)

    def call(self, out, *arguments):
        launches.seen[f"kernel {self.function.__qualname__.split('.')[0]}"] += 1

    with pytest.MonkeyPatch.context() as patch, launches:
        patch.setattr(Kernel, "__call__", call)
        patch.setattr(triton_step.TritonStep, "_launch", launch)
        patch.setattr(triton_step, "problem", lambda device: None)
        patch.setattr(neuron, "triton_step", choose_as_on_cuda)
        patch.setattr(triton_norm, "launch", lambda *a, **k: launch(*a))
        patch.setattr(normed, "in_triton", lambda x: True)
        yield launches.seen


@cache
def count(rule, rates=False, steps=6):
    """The operations of a batch of ResNet-18, by name; the second batch, since the first makes what is made once."""
    model = sltt.models.resnet18().to("meta")
    x, y = torch.empty(128, 3, 32, 32, device="meta"), torch.empty(128, dtype=torch.long, device="meta")
    for _ in range(2):
        model.zero_grad()
        with counting() as seen, sltt.analysis.firing_rates(model) if rates else nullcontext():
            rule(model, x, y, torch.nn.functional.cross_entropy, steps=steps)
    return seen


@pytest.mark.parametrize(
    ("rule", "most"),
    [
        (sltt.SLTT(fold=1), 1158),
        (sltt.SLTT(fold=6), 318),
        (sltt.BPTT(fold=6), 318),
        pytest.param(sltt.OTTT(), 1633, marks=pytest.mark.slow),
        pytest.param(sltt.RateBased(), 1868, marks=pytest.mark.slow),
    ],
    ids=repr,
)
def test_a_batch_launches_no_more_than_its_budget(rule, most):
    seen = count(rule, rates=True)
    assert seen["convolution_backward"] >= 20  # it was counted
    if not rule.repeats:  # the biases in front of a BatchNorm alone; the others are in sums of blocks, as is the head's
        assert seen["bias"] == 11 * seen["convolution"] // 20
    assert seen["kernel of a neuron"] >= 17
    assert seen["kernel _kernels"] == 0
    assert seen["kernel of a neuron"] + seen["convolution"] < seen.total() <= most, seen.most_common()
    if rule == sltt.SLTT(fold=1):  # gradients are added in a launch a step; batches and running means in one a sequence
        assert seen["_foreach_add_"] == (6 - 1) + 2
        assert seen["add_"] == 0


def test_firing_rates_are_counted_in_the_pass_of_the_neuron():
    assert count(sltt.SLTT(fold=6), rates=True) == count(sltt.SLTT(fold=6))


def test_what_is_counted_is_what_would_be_launched():
    x = torch.empty(4, 6, device="meta")
    with counting() as seen:
        (x.t().contiguous() + 1).reshape(2, 12).sum()
    assert seen == {"clone": 1, "add": 1, "sum": 1}
