import pytest
import torch

import sltt
from sltt import kernels
from tests.conftest import SURROGATES
from tests.kernels.steps import CONSTANTS, SIZES, both, compiling, layouts


@pytest.mark.parametrize("constants", CONSTANTS, ids=str)
@pytest.mark.parametrize("learnable", [False, True], ids=["constant", "learnable"])
def test_the_eager_step_equals_the_equations(constants, learnable):
    with kernels.using(compile="off"):
        check_step(constants, SURROGATES[0], learnable, 1023)


@pytest.mark.parametrize("surrogate", SURROGATES, ids=repr)
def test_every_surrogate_and_odd_sizes(surrogate):
    with kernels.using(compile="off"):
        for n in SIZES if surrogate is SURROGATES[0] else (9, 1023):
            check_step(CONSTANTS[0], surrogate, False, n)


@pytest.mark.slow
@pytest.mark.parametrize(("constants", "learnable"), [(CONSTANTS[0], False), (CONSTANTS[7], True)], ids=str)
def test_the_compiled_step_equals_the_equations(constants, learnable):
    with compiling("on"):
        for n in (0, 1, 9, 5000):
            check_step(constants, SURROGATES[0], learnable, n)


def check_step(constants, surrogate, learnable, n):
    v, x = torch.randn(n, dtype=torch.float64), 1.5 * torch.randn(n, dtype=torch.float64)
    constants = {"v_threshold": 0.8, "surrogate": surrogate, **constants}
    (spikes, state, grads), (expected_spikes, expected_state, expected_grads) = both(v, x, constants, 0.6, learnable)
    for a, b in zip([*spikes, state, *grads], [*expected_spikes, expected_state, *expected_grads], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_types(dtype, compile_mode):
    x = (1.5 * torch.randn(4, 2048)).to(dtype)
    constants = {"v_threshold": 1.0, "surrogate": SURROGATES[0], **CONSTANTS[0]}
    (spikes, state, grads), (expected_spikes, expected_state, expected_grads) = both(
        torch.zeros(4, 2048), x, constants, 0.5
    )
    assert all(s.dtype == dtype for s in spikes)
    assert state.dtype == torch.float32
    assert grads[1].dtype == dtype
    for a, b in zip(spikes, expected_spikes, strict=True):
        assert torch.equal(a, b)
    torch.testing.assert_close(state, expected_state)
    torch.testing.assert_close(grads[1], expected_grads[1], rtol=3e-2, atol=3e-2 if dtype != torch.float32 else 1e-5)


@pytest.mark.parametrize("layout", layouts())
def test_any_memory_format(layout, compile_mode):
    x = layouts()[layout]
    results = []
    for data in (x, x.contiguous()):
        leaf = data.detach().requires_grad_()
        neuron = sltt.LIF(tau=2.0)
        s = torch.stack([neuron(leaf) for _ in range(3)])
        (grad,) = torch.autograd.grad((s * torch.linspace(0, 1, x.numel()).view(x.shape)).sum(), leaf)
        results.append((s, grad))
    assert all(map(torch.equal, *results))
    if layout in ("channels-last", "permuted"):
        neuron = sltt.LIF()
        assert neuron(x).stride() == x.stride() == neuron.v.stride()


@pytest.mark.parametrize("size", [0, 7])
@pytest.mark.parametrize("learnable", [False, True], ids=["constant", "learnable"])
@pytest.mark.parametrize("constants", [CONSTANTS[0], CONSTANTS[-2]], ids=str)
@pytest.mark.parametrize("cut", [False, True], ids=["through time", "cut"])
def test_several_steps_in_a_call_equal_single_ones(size, learnable, constants, cut, compile_mode):
    step = kernels.NeuronStep(None if learnable else 0.6, 1.0, surrogate=SURROGATES[0], **constants)
    results = []
    for together in (True, False):
        torch.manual_seed(0)
        v, x = torch.randn(size, 3, requires_grad=True), (2 * torch.randn(4 * size, 3)).requires_grad_()
        rate = torch.tensor(0.6, requires_grad=True)
        decay = rate if learnable else None
        if together:
            s, last = kernels.neuron_step(step, v, x, decay, steps=4, cut=cut)
        else:
            last, spikes = v, []
            for t in range(4):
                before = last.detach() if cut and t else last
                s_t, last = kernels.neuron_step(step, before, x[t * size : (t + 1) * size], decay)
                spikes.append(s_t)
            s = torch.cat(spikes)
        weight = torch.randn(s.shape)
        (s * weight).sum().backward(retain_graph=True)
        last.sum().backward()
        results.append([s, last, x.grad, v.grad, rate.grad])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("neuron", [sltt.LIF, sltt.PLIF, sltt.ALIF])
def test_torch_func_through_a_neuron(neuron):
    layer = neuron().double()
    x = torch.randn(5, 3, dtype=torch.float64)

    def total(x):
        sltt.reset(layer)
        return (layer(x) + 2 * layer(0.5 * x)).sum()

    expected = torch.autograd.grad(total(leaf := x.clone().requires_grad_()), leaf)[0]
    torch.testing.assert_close(torch.func.grad(total)(x), expected)
    torch.testing.assert_close(torch.func.vmap(torch.func.grad(total))(x), expected)
    sltt.reset(layer)
