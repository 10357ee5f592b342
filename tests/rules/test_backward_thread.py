"""The backward runs in another thread, as autograd's does for tensors on CUDA: one without our context variables."""

import copy
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
import torch
from torch import nn
from torch.autograd import graph

import sltt
from sltt import kernels
from sltt._torch import _current_graph_task_id
from sltt.rules.truncated import Truncated
from tests.conftest import LOSS, RULES, batch, gradient, small_network
from tests.references import Checkpointed


@contextmanager
def device_thread():
    """Inside this block, each backward runs in a thread of its own; gives a list with an item for each."""
    ran, run = [], graph._engine_run_backward

    def in_thread(*args, **kwargs):
        if _current_graph_task_id() != -1:  # a backward within a backward stays in its thread
            return run(*args, **kwargs)
        ran.append(1)
        with ThreadPoolExecutor(1) as thread:
            return thread.submit(run, *args, **kwargs).result()

    with pytest.MonkeyPatch.context() as patch:
        for module in (graph, torch.autograd):
            patch.setattr(module, "_engine_run_backward", in_thread)
        yield ran


def train(rule, model, x, y, mixed):
    """Two batches: their losses, and their gradients added up."""
    model = copy.deepcopy(model)
    torch.manual_seed(1)
    with torch.autocast("cpu", torch.bfloat16, enabled=mixed), kernels.using(sparse="on"):
        losses = [rule(model, x, y, LOSS).loss for _ in range(2)]
    return [gradient(model), *losses]


def check(rule, model, mixed):
    """Compare the gradients of a backward in another thread with those of one in this thread."""
    x, y = batch()
    if mixed:
        model, x = model.float(), x.float()
    expected = train(rule, model, x, y, mixed)
    with device_thread() as ran:
        found = train(rule, model, x, y, mixed)
    assert ran
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_a_backward_in_another_thread_gives_the_same_gradients(rule):
    neurons = iter([sltt.LIF, sltt.PLIF])
    check(rule, small_network(lambda: next(neurons)(), norm=True, dropout=0.2), mixed=True)


def checkpointed(model):
    """The network, whose first layer runs again in the backward."""
    return nn.Sequential(Checkpointed(model[0]), *model[1:])


@pytest.mark.parametrize("name", [name for name, rule in RULES.items() if isinstance(rule, Truncated)])
def test_a_checkpoint_in_another_thread_gives_the_same_gradients(name):
    check(RULES[name], checkpointed(small_network(norm=True, dropout=0.2)), mixed=True)


class Squashed(nn.Module):
    """A linear layer whose weights are computed once a sequence."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(6, 8).double()

    def weights(self):
        return 3 * torch.tanh(self.linear.weight)

    def forward(self, x):
        return torch.nn.functional.linear(x, sltt.once(self.weights))


@pytest.mark.parametrize("rule", [sltt.SLTT(), sltt.BPTT()], ids=repr)
def test_a_checkpoint_in_another_thread_knows_what_is_computed_once(rule):
    model = small_network(norm=True)
    model[0] = Squashed()
    check(rule, checkpointed(model), mixed=False)
    x, y = batch()
    found, expected = (train(rule, one, x, y, False) for one in (checkpointed(model), model))
    torch.testing.assert_close(found, expected)
