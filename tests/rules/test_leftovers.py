"""A tensor that a module keeps from step to step, and that no rule knows of, is named."""

import os
import warnings

import pytest
import torch
from torch import nn

import sltt
from tests.conftest import LOSS, batch


class Plain(nn.Module):
    """Keeps its state in an attribute that no rule knows of."""

    def __init__(self):
        super().__init__()
        self.v = None

    def forward(self, x):
        self.v = x if self.v is None else 0.5 * self.v + x
        return torch.tanh(self.v)


class History(nn.Module):
    """Attends over all steps so far, which it keeps in a list."""

    def __init__(self):
        super().__init__()
        self.past = []

    def forward(self, x):
        self.past.append(x)
        past = torch.stack(self.past, 1)
        return torch.nn.functional.scaled_dot_product_attention(x[:, None], past, past)[:, 0]


class Buffered(nn.Module):
    """Keeps its state in a buffer."""

    def __init__(self):
        super().__init__()
        self.register_buffer("v", torch.zeros(1, 1, dtype=torch.float64))

    def forward(self, x):
        self.v = 0.5 * self.v.detach() + x
        return torch.tanh(self.v)


class Undeclared(sltt.LIF):
    """Keeps more than the states that it names."""

    def __init__(self, detaches=True):
        super().__init__()
        self.last, self.detaches = 0.0, detaches

    def forward(self, x):
        self.last = super().forward(x + 0.1 * self.last)
        if self.detaches:
            self.last = self.last.detach()
        return self.last


def network(layer):
    return nn.Sequential(nn.Linear(6, 6), sltt.LIF(), nn.Linear(6, 6), layer, nn.Linear(6, 3)).double()


@pytest.mark.parametrize(
    ("layer", "name", "remedy"),
    [
        (Plain(), "v", r"sltt.register\(Plain, states=\['v'\]\)"),
        (History(), "past", r"sltt.register\(History, states=\['past'\]\)"),
        (Undeclared(detaches=False), "last", "add it to Undeclared.states"),
    ],
)
def test_a_state_that_no_rule_knows_is_named(layer, name, remedy):
    with pytest.raises(ValueError, match=rf"3 \({type(layer).__name__}\) keeps a tensor in `.{name}`.*{remedy}"):
        sltt.SLTT()(network(layer), *batch(), LOSS)


@pytest.mark.parametrize(("kind", "name"), [(Plain, "v"), (History, "past"), (Buffered, "v"), (Undeclared, "last")])
def test_the_check_of_a_model_names_it_too(kind, name):
    with pytest.warns(UserWarning, match=rf"3 \({kind.__name__}\) keeps a tensor of the batch in `.{name}` after the"):
        sltt.check(network(kind()), batch()[0])


@pytest.mark.parametrize(
    "measure",
    [
        sltt.predict,
        lambda model, x: sltt.evaluate(model, both(x), steps=4),
        sltt.unroll,
        lambda model, x: sltt.Stream(model)(x),
        lambda model, x: sltt.interop.to_onnx(model, x[0], os.devnull),
        lambda model, x: sltt.RateBased()(model, x, torch.arange(5) % 3, LOSS),
        lambda model, x: sltt.SLTT(k=1)(model, x, torch.arange(5) % 3, LOSS),
        lambda model, x: [sltt.BPTT()(model, part, torch.arange(5) % 3, LOSS) for part in x[:1, None]],
    ],
)
def test_a_first_run_names_a_state_that_no_rule_knows(measure):
    model = nn.Sequential(nn.Linear(6, 6), sltt.LIF(), Plain(), nn.Linear(6, 3))
    with pytest.warns(UserWarning, match=r"2 \(Plain\) keeps a tensor of the batch in `.v` after the sequence"):
        measure(model, torch.randn(4, 5, 6))


def both(x):
    samples = [*zip(x.unbind(1), [0, 1, 2, 0, 1], strict=True)]
    return sltt.data.from_datasets(samples, None, samples, static=False)


class Listed(nn.Module):
    """Keeps layers in a plain list, where PyTorch does not see them."""

    def __init__(self, *layers):
        super().__init__()
        self.first, self.layers = nn.Linear(6, 3), list(layers)

    def forward(self, x):
        x = self.first(x)
        for layer in self.layers:
            x = layer(x)
        return x


@pytest.mark.filterwarnings("ignore:no module of the model keeps a state")
@pytest.mark.parametrize("rule", [sltt.SLTT(), sltt.SLTT(fold=3), sltt.BPTT(), sltt.BPTT(segment=2), None], ids=repr)
@pytest.mark.parametrize("neurons", [sltt.LIF, lambda: nn.Sequential(nn.Identity(), sltt.LIF())])
def test_neurons_in_a_plain_list_are_named(neurons, rule):
    model, (x, y) = Listed(neurons()).double(), batch()
    with pytest.raises((ValueError, RuntimeError)) as found:
        sltt.unroll(model, x) if rule is None else rule(model, x, y, LOSS)
    said = "\n".join([str(found.value), *getattr(found.value, "__notes__", ())])
    assert "the model (Listed) keeps LIF in a plain list `.layers`, where PyTorch does not see it" in said
    with pytest.raises(ValueError, match=r"keeps LIF in a plain list `.layers`.* use nn.ModuleList"):
        sltt.check(Listed(neurons()).double(), x)


def test_layers_in_a_plain_list_are_warned_of_and_those_that_are_elsewhere_too_are_not():
    model, (x, y) = Listed(nn.Linear(3, 3)), batch()
    model.neuron = sltt.LIF()
    model.layers.append(model.neuron)
    with pytest.warns(UserWarning, match=r"keeps Linear in a plain list `.layers`.* neither trained nor saved"):
        sltt.check(model, x.float())
    model.layers[0].requires_grad_(False)  # such as a teacher
    sltt.check(model, x.float())
    sltt.SLTT()(model, x.float(), y, LOSS)


class Recording(sltt.LIF):
    def forward(self, x):
        self._last = super().forward(x)
        return self._last


class Averaged(nn.Module):
    """Has a buffer with as many rows as the batch has samples."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(5, 6, dtype=torch.float64))

    def forward(self, x):
        self.mean = 0.9 * self.mean + 0.1 * x.detach().mean(0)
        return x - self.mean[0]


class Table(nn.Module):
    def __init__(self):
        super().__init__()
        self.rows = torch.ones(5, 6, dtype=torch.float64)  # as many as the batch has samples, and there before it

    def forward(self, x):
        return x * self.rows


class Logged(Plain):
    pass


sltt.register(Logged, states=[])


@pytest.mark.parametrize("kind", [Recording, Averaged, Table, Logged])
def test_what_is_no_state_is_not_warned_of(kind):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".* mixes ")
        sltt.check(network(kind()), batch()[0])  # without a warning of a state
