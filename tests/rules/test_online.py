"""Updates of the weights at every time step: what each of them has to reach."""

import copy
from functools import partial

import pytest
import torch
from torch import nn

import sltt
from sltt import kernels
from tests.conftest import LOSS, batch


def test_an_update_at_every_step_reaches_weights_that_are_computed_once_a_sequence():
    class Centred(nn.Linear):
        def centred(self):
            return self.weight - self.weight.mean(1, keepdim=True)

        def forward(self, x):
            return nn.functional.linear(x, sltt.once(self.centred), self.bias)

    torch.manual_seed(0)
    model = nn.Sequential(Centred(6, 8), sltt.LIF(tau=2.0, v_threshold=0.3), nn.Linear(8, 3)).double()
    before = model[0].weight.detach().clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x, y = batch()
    sltt.OTTT(online=True)(model, x, y, LOSS, update=lambda: (optimizer.step(), optimizer.zero_grad()))
    assert (model[0].weight - before).abs().max() > 1e-4


class Own(sltt.Rule):
    """SLTT that changes the weights itself."""

    online = True

    def run(self, batch):
        for t in range(batch.steps):
            batch.backward(batch.forward(range(t, t + 1)))
            descend(batch.model)
            batch.detach()
        return batch.output()


def descend(model):
    """A step of gradient descent that autograd does not notice."""
    for p in model.parameters():
        p.data.sub_(0.02 * p.grad)
        p.grad = None


def step(model, **settings):
    """The same by an optimizer."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, **settings)
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize(
    ("rule", "update"),
    [
        (sltt.OTTT(online=True), step),
        (sltt.OTTT(online=True), partial(step, fused=True)),
        (sltt.OTTT(online=True), descend),
        (Own(), lambda model: None),
    ],
    ids=["step", "fused", "data", "own"],
)
def test_updated_weights_are_packed_and_inside_autocast_cast_anew(rule, update):
    torch.manual_seed(0)
    layers = [sltt.LIF(tau=2.0, v_threshold=0.3), nn.AvgPool2d(2), nn.Conv2d(16, 16, 3, padding=1), nn.AvgPool2d(8)]
    model = nn.Sequential(*layers, nn.Flatten()).to(memory_format=torch.channels_last)
    x, y = torch.rand(5, 8, 16, 16, 16).movedim(-1, 2), torch.randint(16, (8,))
    logits = []
    for enabled, sparse in ((False, "off"), (False, "on"), (True, "off"), (True, "on")):
        trained = copy.deepcopy(model)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled), kernels.using(sparse=sparse):
            logits.append(rule(trained, x, y, LOSS, update=partial(update, trained)).logits.float())
    assert (logits[0][-1] - logits[0][0]).abs().max() > 0.2
    for other in logits[1:]:
        torch.testing.assert_close(other, logits[0], rtol=0.0, atol=0.02)
