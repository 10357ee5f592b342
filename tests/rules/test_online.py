"""Updates of the weights at every time step: what each of them has to reach."""

import copy
from functools import partial

import torch
from torch import nn

import sltt
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


def test_updated_weights_are_cast_anew_inside_autocast():
    torch.manual_seed(0)
    model = nn.Sequential(sltt.LIF(tau=2.0, v_threshold=0.3), nn.Linear(6, 3))
    x, y = torch.rand(5, 8, 6), torch.randint(3, (8,))
    logits = []
    for enabled in (False, True):
        trained = copy.deepcopy(model)
        optimizer = torch.optim.SGD(trained.parameters(), lr=1.0)
        update = partial(lambda one: (one.step(), one.zero_grad()), optimizer)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            logits.append(sltt.OTTT(online=True)(trained, x, y, LOSS, update=update).logits.float())
    assert (logits[0][-1] - logits[0][0]).abs().max() > 0.2
    torch.testing.assert_close(logits[1], logits[0], rtol=0.0, atol=0.02)
