import pytest
import torch
from torch import nn

import sltt
from tests.conftest import LOSS, batch, gradient, gradients
from tests.interop.libraries import gradients_of, network


class Recurrent(sltt.Stateful):
    """A recurrent cell with its hidden state kept, and logits on top."""

    states = ("hidden",)

    def __init__(self, cell):
        super().__init__()
        self.cell, self.out = cell, nn.Linear(8, 3)

    def forward(self, x):
        self.hidden = self.cell(x, self.hidden)
        return self.out(self.hidden[0] if isinstance(self.hidden, tuple) else self.hidden)


@pytest.mark.parametrize("cell", [nn.GRUCell, nn.LSTMCell])
@pytest.mark.parametrize("rule", [sltt.BPTT(), sltt.BPTT(segment=2), sltt.SLTT()], ids=repr)
def test_a_recurrent_cell_in_a_stateful_module_is_a_state_like_any_other(cell, rule):
    model = Recurrent(cell(6, 8)).double()
    x, y = batch()
    hidden, total = None, 0
    for x_t in x:
        hidden = model.cell(x_t, hidden)
        total = total + LOSS(model.out(hidden[0] if isinstance(hidden, tuple) else hidden), y) / len(x)
        if isinstance(rule, sltt.SLTT):
            hidden = tuple(h.detach() for h in hidden) if isinstance(hidden, tuple) else hidden.detach()
    total.backward()
    expected = gradient(model)
    torch.testing.assert_close(gradients_of(rule, model, x, y), expected, rtol=1e-10, atol=1e-13)


class Theirs(nn.Module):
    """A neuron of a library that nobody knows."""

    def __init__(self):
        super().__init__()
        self.potential = None

    def forward(self, x):
        v = x if self.potential is None else 0.5 * self.potential + x
        s = sltt.surrogates.Triangle()(v - 1)
        self.potential = v - s
        return s


def test_a_registered_type_is_a_neuron_like_ours():
    class Unknown(Theirs):
        pass

    sltt.register(Unknown, states=(name for name in ["potential"]), spikes=True)
    model, ours = network(Unknown(), Unknown()).double(), network(sltt.LIF(tau=2.0), sltt.LIF(tau=2.0)).double()
    ours.load_state_dict(model.state_dict())
    x, y = batch()
    for rule in (sltt.BPTT(), sltt.BPTT(segment=2), sltt.SLTT(), sltt.OTTT(decay=0.5)):
        torch.testing.assert_close(gradients(model, rule, x, y)[0], gradients(ours, rule, x, y)[0])
    rule(model, x, y, LOSS)
    assert model[1].potential is None
