"""Chunks of a stream against `sltt.unroll` on the whole."""

import copy
import io
from collections import deque
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import sltt
from sltt.analysis import peak_memory
from tests.conftest import LOSS, NEURONS, batch, gradient, gradients, seeded, small_network
from tests.interop.libraries import CASES, network_of
from tests.neurons.test_kinds import EQUATIONS

OURS = {**NEURONS, **{name: make for name, (make, _) in EQUATIONS.items() if name != "ChannelLIF"}}
MORE = {  # layers behind the first neurons
    "ChannelLIF": lambda: [nn.Linear(8, 8), sltt.ChannelLIF(8, v_threshold=0.3)],
    "Recurrent": lambda: [nn.Linear(8, 8), sltt.Recurrent(sltt.LIF(v_threshold=0.3), nn.Linear(8, 8))],
    "Delay": lambda: [sltt.Delay([0, 2, 5]), nn.Linear(24, 8)],
    "RunningMax": lambda: [nn.Unflatten(1, (2, 4)), sltt.RunningMax(nn.MaxPool1d(2)), nn.Flatten(), nn.Linear(4, 8)],
}
NAMES = [*OURS, *MORE, *CASES]


def network(name):
    if name not in CASES:
        model = small_network(OURS.get(name, sltt.LIF), norm=True, dropout=0.5)
        model.insert(3, nn.Sequential(*MORE.get(name, list)())).double()
        return model.eval(), torch.float64
    case, kind, arguments = CASES[name]
    model, x, _ = network_of(case(kind, **arguments))
    return model.eval(), x.dtype


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=4)
@given(lengths=st.lists(st.integers(1, 6), min_size=2, max_size=4), data=st.data())
def test_chunks_give_what_the_whole_gives(name, lengths, data):
    model, dtype = network(name)
    x = 2 * torch.randn(sum(lengths), 3, 6, dtype=dtype)
    expected, folded = (sltt.unroll(model, x, fold=fold) for fold in (1, "auto"))
    exact, stream = sltt.Stream(model, fold=1), sltt.Stream(model)
    saved = data.draw(st.integers(0, len(lengths) - 1))
    for i, chunk in enumerate(x.split(lengths)):
        at = sum(lengths[:i])
        assert torch.equal(exact(chunk), expected[at : at + len(chunk)])
        torch.testing.assert_close(stream(chunk), folded[at : at + len(chunk)])
        if i == saved:  # another stream of a copy goes on
            state, exact = copy.deepcopy(exact.state_dict()), sltt.Stream(copy.deepcopy(model), fold=1)
            exact.load_state_dict(state)
        sltt.unroll(model, x[:2, :1])  # of another batch, in between
    whole = sltt.Stream(model, fold=1)
    whole(x)
    torch.testing.assert_close(exact.states, whole.states, rtol=0, atol=0)


@pytest.mark.parametrize("name", NAMES)
def test_some_samples_begin_anew(name):
    model, dtype = network(name)
    x = 2 * torch.randn(9, 60, 6, dtype=dtype)
    stream, mask = sltt.Stream(model, fold=1), torch.arange(60) % 3 == 0
    stream(x[:5])
    if name.startswith("norse") or name == "jelly LIF, soft":  # which keeps a list of its states
        with pytest.raises(ValueError, match=r"1 \(\w+\) does not say what its \w+ is before .*interop.convert"):
            stream.reset(mask)
        return
    stream.reset(mask)
    found, whole, fresh = stream(x[5:]), sltt.unroll(model, x, fold=1)[5:], sltt.unroll(model, x[5:], fold=1)
    assert torch.equal(found, torch.where(mask[:, None], fresh, whole))
    assert not torch.equal(fresh[:, mask], whole[:, mask])


def test_memory_stays_the_same_over_a_long_stream():
    stream, x = sltt.Stream(network("Delay")[0]), torch.randn(10, 2, 6, dtype=torch.float64)
    used = [peak_memory(partial(deque, map(stream, [x] * n), maxlen=0)) for n in (5, 5, 40)]
    assert used[2] <= 1.05 * used[1]


def test_what_a_stream_refuses():
    (model, _), labels = network("LIF"), torch.zeros(2, dtype=torch.long)
    stream, other, x = sltt.Stream(model), network("RunningMax")[0], torch.randn(4, 2, 6, dtype=torch.float64)
    before = stream(x)
    train = {"target": labels, "loss": LOSS, "stream": stream}
    refused = {
        r"of shape \[2, 6\] as before, got \[1, 6\]: call reset": lambda: stream(x[:, :1]),
        "a finite input": lambda: stream(x / 0),
        "network of the stream, with states in 2, 4, 6": lambda: sltt.SLTT()(other.train(), x, **train),
        r"RateBased\(\) has mean rates": lambda: sltt.RateBased()(model.train(), x, **train),
    }
    for message, call in refused.items():
        with pytest.raises(ValueError, match=message):
            call()
    torch.testing.assert_close(torch.cat([before, stream(x)]), sltt.unroll(model.eval(), torch.cat([x, x])))
    with pytest.warns(UserWarning, match=r"1 \(BatchNorm1d\) learns no statistics in evaluation mode"):
        sltt.SLTT()(model, x, labels, LOSS)


RULES = [sltt.SLTT(), sltt.SLTT(fold=1), sltt.TBPTT(1), sltt.OTTT(), sltt.OTTT(fold=1), sltt.OTTT(inputs=False)]


IN_CHUNKS = [(rule, name) for rule in RULES for name in ("LIF(tau=2)", "PLIF", "CubaLIF", "Recurrent", "snn Leaky")]


@pytest.mark.parametrize(("rule", "name"), [*IN_CHUNKS, (sltt.SLTT(credit="none"), "Delay")], ids=str)
def test_a_rule_in_chunks_has_the_gradient_of_the_whole(rule, name):
    model, dtype = network(name)
    model.train()
    x, y = 2 * torch.randn(9, 600, 6, dtype=dtype), torch.randint(3, (600,))  # a delay keeps them as bits
    expected, whole = seeded(gradients, model, rule, x, y)
    total, out, stream = 0, whole, sltt.Stream(model)
    torch.manual_seed(1)
    for part in x.split([1, 3, 5]):
        model.zero_grad()
        out = rule(model, part, y, LOSS, stream=stream)
        total = total + gradient(model) * len(part) / len(x)
    torch.testing.assert_close(total, expected)
    torch.testing.assert_close(out.logits, whole.logits[-5:])
    again = sltt.Stream(model)
    torch.save(stream.state_dict(), saved := io.BytesIO())
    again.load_state_dict(torch.load(io.BytesIO(saved.getvalue())))
    assert torch.equal(again(x), stream(x))


def test_every_rule_leaves_the_states_behind_the_last_step(rule):
    model, (x, y) = small_network(), batch(steps=6)
    stream, expected = sltt.Stream(model), sltt.Stream(model)
    if not rule.pads:
        pytest.skip("it has mean rates of whole sequences")
    expected(x)
    rule(model, x, y, LOSS, stream=stream)
    torch.testing.assert_close(stream.states, expected.states)
