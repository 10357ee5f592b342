import copy

import pytest
import torch
from torch import nn

import sltt
from sltt import kernels
from sltt.analysis import peak_memory
from sltt.models.nfresnet import ScaledWSConv2d
from tests.conftest import batch, gradients, small_network

LOSS = sltt.losses.CrossEntropyMSE()


def by_hand(model, x, y, decay, update=None):
    """OTTT's equations for Linear, LIF, Linear, LIF, Linear: e from SLTT's graph of one step, and the traces."""
    first, lif1, second, lif2, third = model
    sltt.reset(model)
    traces = {second: 0, third: 0}
    for x_t in x:
        inputs, outputs = {}, {}
        z = first(x_t)
        s = lif1(z)
        for layer, neuron in ((second, lif2), (third, None)):
            inputs[layer], outputs[layer] = s.detach(), layer(s)
            s = outputs[layer] if neuron is None else neuron(outputs[layer])
        errors = torch.autograd.grad(LOSS(s, y) / len(x), [z, *outputs.values()])
        pairs = zip((first, second, third), errors, strict=True)
        for layer, e in pairs:
            if layer in traces:
                traces[layer] = decay * traces[layer] + inputs[layer]
            a = traces.get(layer, x_t)
            for p, grad in ((layer.weight, e.T @ a), (layer.bias, e.sum(0))):
                p.grad = grad if p.grad is None else p.grad + grad
        sltt.detach(model)
        if update:
            update()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None] or [torch.zeros(0)])


def network(tau=2.0):
    layers = [nn.Linear(6, 8), sltt.LIF(tau=tau), nn.Linear(8, 7), sltt.LIF(tau=tau), nn.Linear(7, 3)]
    for layer in layers[::2]:
        layer.weight.data.mul_(3)
    return nn.Sequential(*layers).double()


@pytest.mark.parametrize("decay", [None, 0.3])
def test_ottt_is_its_equations(decay):
    model = network()
    x, y = batch(steps=5)
    found, out = gradients(model, sltt.OTTT(decay), x, y)
    expected = by_hand(copy.deepcopy(model), x, y, 0.5 if decay is None else decay)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(out.logits, sltt.unroll(model, x))
    assert not torch.allclose(found, gradients(model, sltt.SLTT(), x, y)[0])


def test_an_update_at_every_step():
    model = network()
    twin = copy.deepcopy(model)
    x, y = batch(steps=4)

    def updating(model):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        return lambda: (optimizer.step(), optimizer.zero_grad())

    sltt.OTTT(online=True)(model, x, y, LOSS, update=updating(model))
    by_hand(twin, x, y, 0.5, updating(twin))
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a, b)
    with pytest.raises(ValueError, match=r"call it with update="):
        sltt.OTTT(online=True)(model, x, y, LOSS)


@pytest.mark.parametrize("norm", [False, True])
def test_without_a_trace_or_with_one_step_it_is_sltt(neuron, norm):
    model = small_network(neuron, norm=norm)
    x, y = batch()
    torch.testing.assert_close(gradients(model, sltt.OTTT(0.0), x, y)[0], gradients(model, sltt.SLTT(), x, y)[0])
    found, expected = (gradients(model, rule, x[:1], y)[0] for rule in (sltt.OTTT(0.9), sltt.SLTT()))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("form", ["plain", "strided", "grouped", "dilated", "without bias"])
def test_convolutions(form):
    settings = {
        "strided": {"stride": 2},
        "grouped": {"groups": 2},
        "dilated": {"dilation": 2},
        "without bias": {"bias": False},
    }
    conv = nn.Conv2d(4, 4, 3, padding=2, **settings.get(form, {}))
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), sltt.LIF(), nn.AvgPool2d(2), conv, nn.BatchNorm2d(4), sltt.LIF(),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, 3),
    ).double()  # fmt: skip
    x, y = 3 * torch.randn(4, 3, 2, 8, 8, dtype=torch.float64), torch.randint(3, (3,))
    torch.testing.assert_close(gradients(model, sltt.OTTT(0.0), x, y)[0], gradients(model, sltt.SLTT(), x, y)[0])
    traced, plain = (gradients(model, rule, x, y)[0] for rule in (sltt.OTTT(0.5), sltt.SLTT()))
    first = sum(p.numel() for p in model[0].parameters())
    torch.testing.assert_close(traced[:first], plain[:first])  # before the first neuron
    assert not torch.allclose(traced, plain)


def test_autocast_and_the_sign_of_the_gradient():
    model = network().float()
    x, y = batch(steps=3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, _ = gradients(model, sltt.OTTT(), x.float(), y)
    expected, _ = gradients(model, sltt.OTTT(), x.float(), y)
    assert torch.cosine_similarity(found, expected, dim=0) > 0.9


def test_memory_does_not_grow_with_time_and_nothing_is_left_behind():
    model = sltt.models.DigitsNet()
    x, y = torch.randn(64, 1, 8, 8), torch.randint(10, (64,))

    def measured(steps):
        with kernels.using(compile="off"):
            return peak_memory(lambda: sltt.OTTT()(model, x, y, LOSS, steps=steps))

    measured(2)
    assert measured(32) <= 1.05 * measured(4)
    assert all("forward" not in vars(m) and not m._forward_hooks for m in model.modules())
    with pytest.raises(ZeroDivisionError):
        sltt.OTTT()(model, x, y, lambda logits, target: 1 / 0, steps=2)
    assert all("forward" not in vars(m) for m in model.modules())


def twice():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.lif, self.layer, self.head = sltt.LIF(), nn.Linear(6, 6), nn.Linear(6, 3)

        def forward(self, x):
            return self.head(self.layer(self.layer(self.lif(x))))

    return Twice()


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            lambda: nn.Sequential(sltt.LIF(tau=2.0), nn.Linear(6, 6), sltt.LIF(tau=4.0), nn.Linear(6, 3)),
            "choose one for",
        ),
        (lambda: nn.Sequential(sltt.Dropout(0.5), nn.Linear(6, 3)), "neurons have λ = \\[\\]"),
        (twice, "Linear is used twice in a time step, and has one trace only"),
        (lambda: nn.Sequential(sltt.LIF(), ScaledWSConv2d(6, 3, 1)), "knows PyTorch's own linear layers"),
        (lambda: nn.Sequential(sltt.LIF(), nn.Conv1d(6, 3, 3, padding=1, padding_mode="circular")), "padded by zeros"),
    ],
    ids=["two decays", "no neuron", "twice", "standardised", "circular"],
)
def test_networks_that_ottt_does_not_know_are_refused(model, message):
    x, y = torch.randn(2, 4, 6), torch.randint(3, (4,))
    with pytest.raises(ValueError, match=message):
        sltt.OTTT()(model(), x, y, LOSS)
    with pytest.raises(ValueError, match="decay must be at least 0 and at most 1"):
        sltt.OTTT(1.5)
