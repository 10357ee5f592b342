import copy
import itertools
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import sltt
from tests.conftest import SURROGATES

RESETS = [None, 0.0, -0.3]


def literal(x, lam, v_threshold, v_reset, decay_input, detach_reset, surrogate, subtract=None):
    """The equations of the paper, transcribed with autograd: u before the reset is kept, one loop over time."""
    rest, amount = 0.0 if v_reset is None else v_reset, subtract or v_threshold
    u, s = torch.full_like(x[0], rest), torch.zeros_like(x[0])
    spikes = []
    for x_t in x:
        r = s.detach() if detach_reset else s
        # the reset of the step before, at the beginning of this one
        after = u - amount * r if v_reset is None else (1 - r) * u + r * v_reset
        u = lam * (after - rest) + rest + ((1 - lam) * x_t if decay_input else x_t)
        s = surrogate(u - v_threshold)
        spikes.append(s)
    after = u - amount * (s.detach() if detach_reset else s)
    if v_reset is not None:
        r = s.detach() if detach_reset else s
        after = (1 - r) * u + r * v_reset
    return torch.stack(spikes), after


def unrolled(neuron, x):
    return torch.stack([neuron(x_t) for x_t in x])


KINDS = [("LIF 1.3", False), ("LIF", False), ("LIF", True), ("PLIF", False), ("PLIF", True), ("IF", False)]
CASES = [(*case, SURROGATES[0]) for case in itertools.product(KINDS, RESETS, [False, True])]
CASES += [(("PLIF", True), -0.3, False, surrogate) for surrogate in SURROGATES[1:]]


@pytest.mark.parametrize(("neuron", "v_reset", "detach_reset", "surrogate"), CASES, ids=str)
def test_forward_and_gradients_equal_the_equations(neuron, surrogate, v_reset, detach_reset):
    kind, decay_input = neuron
    arguments = {"v_threshold": 0.8, "v_reset": v_reset, "detach_reset": detach_reset, "surrogate": surrogate}
    kind, _, amount = kind.partition(" ")
    subtract = float(amount) if amount else None
    arguments |= {"subtract": subtract} if amount else {}
    if kind == "IF":
        neuron, lam = sltt.IF(**arguments), 1.0
    else:
        neuron = getattr(sltt, kind)(tau=1.7, decay_input=decay_input, **arguments).double()
        lam = 1 - 1 / 1.7
    x = (torch.randn(6, 4, 3, dtype=torch.float64) + 0.5).requires_grad_()
    weights = torch.randn(6, 4, 3, dtype=torch.float64)

    if kind == "PLIF":
        w = neuron.w.detach().clone().requires_grad_()
        lam = 1 - torch.sigmoid(w)
    spikes = unrolled(neuron, x)
    ((spikes * weights).sum() + neuron.v.sum()).backward()
    got, x.grad = x.grad, None

    expected_spikes, expected_v = literal(x, lam, 0.8, v_reset, decay_input, detach_reset, surrogate, subtract)
    ((expected_spikes * weights).sum() + expected_v.sum()).backward()
    assert 0 < spikes.mean() < 1
    torch.testing.assert_close(spikes, expected_spikes)
    torch.testing.assert_close(neuron.v, expected_v)
    torch.testing.assert_close(got, x.grad, rtol=1e-12, atol=1e-12)
    if kind == "PLIF":
        torch.testing.assert_close(neuron.w.grad, w.grad, rtol=1e-10, atol=1e-10)


@settings(max_examples=60, deadline=None)
@given(
    decay=st.floats(0, 1),
    threshold=st.floats(0.1, 3),
    x=st.lists(st.floats(-4, 4), min_size=1, max_size=5),
    v=st.floats(-2, 2),
)
def test_soft_reset_conserves_the_charge(decay, threshold, x, v):
    x = torch.tensor(x, dtype=torch.float64)
    spikes, after = sltt.lif_step(torch.full_like(x, v), x, decay=decay, v_threshold=threshold)
    torch.testing.assert_close(after + threshold * spikes, decay * torch.full_like(x, v) + x)
    assert set(spikes.tolist()) <= {0.0, 1.0}


def test_state_takes_shape_device_and_type_of_the_first_input(neuron):
    neuron = neuron()
    assert neuron.v is None
    for x in (torch.randn(2, 3), torch.randn(5, 4, 2, 2, dtype=torch.bfloat16)):
        sltt.reset(neuron)
        neuron(x)
        assert neuron.v.shape == x.shape
        assert neuron.v.dtype == torch.float32
        assert neuron.v.device == x.device


def test_every_sequence_starts_from_v_init(neuron):
    plain, started = neuron(v_reset=-0.5), neuron(v_reset=-0.5, v_init=0.6)
    x = torch.randn(5, 7, dtype=torch.float64)
    plain.v = torch.full_like(x, 0.6)
    for _ in range(2):
        assert torch.equal(started(x), plain(x))
        assert torch.equal(started.v, plain.v)
    sltt.reset(started)
    assert started.v is None
    assert torch.equal(started(x), neuron(v_reset=-0.5, v_init=0.6)(x))
    assert "v_init=0.6" in repr(started)
    assert "v_init" not in repr(plain)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_half_state_takes_the_inputs_type(neuron, dtype):
    for half_state in (False, True):
        module = neuron(half_state=half_state).to(dtype)
        x = torch.randn(2, 3, dtype=dtype)
        assert module(x).dtype == dtype
        assert module.v.dtype == (dtype if half_state or dtype == torch.float64 else torch.float32)


def test_hard_reset_starts_from_the_reset_potential(neuron):
    neuron = neuron(v_reset=-0.5)
    neuron(torch.full((1, 1), -100.0))
    expected = -100.5  # v_r + λ (v_r − v_r) + x
    assert neuron.v.item() == pytest.approx(expected)


@pytest.mark.parametrize("x", [torch.randn(3, 3), torch.randn(2, 3).double(), torch.empty(2, 3, device="meta")])
def test_a_changed_input_without_a_reset_is_refused(neuron, x):
    neuron = neuron()
    neuron(torch.randn(2, 3))
    with pytest.raises(ValueError, match=r"sltt\.reset"):
        neuron(x)


def test_state_is_no_part_of_the_state_dict_and_survives_a_copy(neuron):
    neuron = neuron()
    with torch.no_grad():
        neuron(torch.randn(2, 5000))  # large enough for a compiled kernel
    assert "v" not in neuron.state_dict()
    for other in (copy.deepcopy(neuron), pickle.loads(pickle.dumps(neuron))):
        assert torch.equal(other.v, neuron.v)
        assert repr(other) == repr(neuron)


def test_data_parallel_is_refused():
    model = nn.DataParallel(nn.Sequential(nn.Linear(3, 3), sltt.LIF()))
    with pytest.raises(ValueError, match="use DistributedDataParallel"):
        sltt.unroll(model, torch.randn(2, 2, 3))


@given(beta=st.floats(0.001, 0.999))
def test_from_beta(beta):
    neuron = sltt.LIF.from_beta(beta, v_threshold=0.5)
    assert neuron.decay() == pytest.approx(beta)
    assert neuron.v_threshold == 0.5


def test_plif_keeps_tau_valid_and_learns_it():
    neuron = sltt.PLIF(tau=1.5)
    assert neuron.tau == pytest.approx(1.5)
    assert [name for name, _ in neuron.named_parameters()] == ["w"]
    with torch.no_grad():
        neuron.w.fill_(20.0)
    assert neuron.tau == pytest.approx(1)
    with torch.no_grad():
        neuron.w.fill_(-200.0)
    assert neuron.tau > 1e80
    assert "tau=" in repr(neuron)


def test_reset_and_detach_reach_every_stateful_module():
    model = nn.Sequential(nn.Linear(3, 3), sltt.LIF(), nn.Sequential(sltt.Dropout(0.5), sltt.PLIF()))
    model(torch.randn(2, 3))
    assert model[1].v.requires_grad
    sltt.detach(model)
    assert not any(m.v.requires_grad for m in (model[1], model[2][1]))
    assert model[2][0].mask is not None
    sltt.reset(model)
    assert model[1].v is None
    assert model[2][1].v is None
    assert model[2][0].mask is None
