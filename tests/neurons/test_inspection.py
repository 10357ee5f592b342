"""What is wrong with a neuron's function is said at its first step."""

import pytest
import torch
from torch import nn

import sltt

FIRE = sltt.surrogates.Triangle()
MEMORY = []
GAIN = nn.Parameter(torch.tensor(2.0))


def neuron(function):
    return type("Mine", (sltt.Neuron,), {"step": staticmethod(function)})()


def remembers(x, v):
    MEMORY.append(1)
    u = v + x + len(MEMORY)
    return FIRE(u - 1), u


def branches(x, v):
    u = v + x if x.mean() > 0 else v
    return FIRE(u - 1), u


def changes(x, v):
    v += x
    return FIRE(v - 1), v


def rate_based(model, x):
    sltt.RateBased(steady=True)(model, x, torch.arange(4), nn.CrossEntropyLoss())


BAD = {
    "gives a neuron another result alone.*keep what step remembers in a state": remembers,
    "draws random numbers": lambda x, v: (FIRE(v + x - torch.rand_like(x)), v),
    "decides by the value of a tensor.*torch.where": branches,
    r"decides by the value of a tensor.*v\[v > 1\]": lambda x, v: (FIRE(v + x - 1), v - v[v > 1].sum()),
    r"gives a neuron another .*alone ": lambda x, v: (FIRE(v + x - max(x.flatten().tolist())), v + x),
    r"gives a neuron another .*among others": lambda x, v: (FIRE(v + x - float(x.detach().numpy().max())), v + x),
    "gives a neuron another result": lambda x, v: (FIRE(v + x - 1.0 * (x.ndim == 3)), v + x),
    "gives a neuron another .*shape": lambda x, v: (FIRE(v + x - torch.linspace(0, 2, x.shape[-1])), v + x),
    "gives a neuron another .*without the shape": lambda x, v: (FIRE(v + x - torch.ones(x.shape[1], 1)), v + x),
    "takes tau, and the neuron has none: set self.tau": lambda x, v, *, tau: (FIRE(tau * v + x - 1), v + x),
    "changes an argument in place": changes,
    "reads a tensor that is none of its arguments": lambda x, v: (FIRE(GAIN * v + x - 1), v + x),
    r"returns v \[4\] \(float32\) for an input \[4, 3, 5\]": lambda x, v: (FIRE(v + x), v.sum((1, 2))),
    r"returns spikes \[4, 3, 5\] \(float64\)": lambda x, v: (FIRE(v + x).double(), v),
    r"returns 1 value; return \(spikes, v\)": lambda x, v: FIRE(v + x),
    r"returns 3 values; return \(spikes, v\)": lambda x, v: (FIRE(v + x), v, v),
    "gives a neuron another .*mix neurons in a layer before": lambda x, v: (FIRE(v + x - x.mean()), v + x),
    "returns spikes that no gradient passes": lambda x, v: ((v + x > 1).to(x.dtype), v + x),
    "takes .x, u., expected x and the states v": lambda x, u: (FIRE(u + x), u),
}


@pytest.mark.parametrize(("message", "function"), BAD.items(), ids=BAD)
def test_a_function_that_cannot_be_fused_is_named(message, function):
    with pytest.raises(ValueError, match=rf"Mine.step {message}"):
        neuron(function)(torch.randn(2, 3))


def fine(x, v):
    return FIRE(v + x), v


def scaled(x, v, *, gain):
    return FIRE(gain * x + v - 1), v + x


START = r"has start = .*: expected a number, or one for each state \(v\)"
GAIN_SHAPE = r"has gain of shape .* for an input \[2, 3, 4\]: expected one number, or"
WRONG = [
    ({"step": staticmethod(fine), "start": {"u": 0.0}}, START),
    ({"step": staticmethod(fine), "start": {"v": 0.0, "a": 0.0}}, START),
    ({"step": staticmethod(fine), "start": "0"}, START),
    (
        {"step": staticmethod(lambda x, mem: fine(x, mem)), "states": "mem"},
        r"has states = 'mem': write a tuple of names",
    ),
    ({"step": staticmethod(lambda x: FIRE(x)), "states": ()}, r"has no states: what keeps none is an nn\.Module"),
    ({"step": lambda self, x, v: fine(x, v)}, r"needs a function step\(x, v, \*, …\).*@staticmethod"),
    ({"step": staticmethod(scaled), "gain": torch.ones(3, 1)}, GAIN_SHAPE),
    ({"step": staticmethod(scaled), "gain": torch.ones(4)}, GAIN_SHAPE),
    ({"step": staticmethod(scaled), "gain": [1.0]}, r"has gain = \[1.0\]: expected a number, a surrogate or a tensor"),
]


@pytest.mark.parametrize(("attributes", "message"), WRONG)
def test_an_attribute_that_is_wrong_is_named(attributes, message):
    with pytest.raises(ValueError, match=f"Mine {message}"):
        type("Mine", (sltt.Neuron,), attributes)()(torch.randn(2, 3, 4))


@pytest.mark.parametrize("name", ["training", "spikes", "advance", "forward", "step"])
def test_a_state_has_a_name_of_its_own(name):
    with pytest.raises(ValueError, match=rf"Mine has a state '{name}', which modules have already"):
        type("Mine", (sltt.Neuron,), {"states": (name,)})


def test_an_error_in_the_function_says_where_it_was():
    with pytest.raises(ZeroDivisionError) as found:
        neuron(lambda x, v: (FIRE(x / 0 if (1 / 0) else x), v))(torch.randn(2, 3))
    assert "in Mine.step" in found.value.__notes__[0]


def test_the_check_leaves_random_numbers_alone_and_knows_constants():
    fine = neuron(lambda x, v: (FIRE(v + torch.tensor(0.5) * x - 1), v.clone().add_(x)))
    before = torch.get_rng_state()
    assert fine(torch.ones(2, 3)).shape == (2, 3)
    assert torch.equal(before, torch.get_rng_state())


def test_the_check_knows_a_default_device():
    x = torch.ones(2, 3)
    with torch.device("meta"):
        assert neuron(lambda x, v: (FIRE(v + x - 1), v + x))(x).device == x.device


class Noisy(sltt.surrogates.Triangle):
    def fires(self, x):
        return x > torch.rand_like(x)


@pytest.mark.parametrize("kind", [sltt.LIF, sltt.IF, sltt.PLIF, sltt.CubaLIF])
@pytest.mark.parametrize("run", [sltt.unroll, rate_based], ids=["unroll", "RateBased"])
def test_a_surrogate_that_draws_random_numbers_is_refused(kind, run):
    model = nn.Sequential(nn.Linear(3, 5), kind(surrogate=Noisy()))
    with pytest.raises(ValueError, match=r"IF\.step draws random numbers"):
        run(model, torch.randn(2, 4, 3))
