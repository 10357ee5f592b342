"""A look finds spikes by their values, and packs them as bits: in native code and without it."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import sltt
from sltt import kernels
from sltt.kernels import native
from sltt.kernels.spikes.looks import PACK_FROM
from tests.kernels.exact import NATIVE
from tests.kernels.steps import threads

DTYPES = torch.float32, torch.bfloat16, torch.float16, torch.float64
PART = 2**16  # elements that one thread looks at


def look(x):
    """What a look finds; the same with and without native code."""
    with pytest.MonkeyPatch.context() as without:
        for name in ("library", "find_loaded"):
            without.setattr(native, name, lambda: None)
        found = kernels.look(x)
        dense = found and found.dense()
    if native.library():
        fast = kernels.look(x)
        assert (fast is None) == (found is None)
        if found:
            assert (fast.one, fast.count) == (found.one, found.count)
            assert torch.equal(fast.bits, found.bits)
            assert torch.equal(dense, fast.dense())
    return found


def drawn(shape, density=0.3, dtype=torch.float32):
    return (torch.rand(shape) < density).to(dtype)


LAYOUTS = {
    "contiguous": lambda x: x,
    "channels last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "transposed": lambda x: x.movedim(0, -1),
    "a part": lambda x: x[1:],
    "half of the channels": lambda x: x.movedim(1, 0).contiguous()[:8].movedim(0, 1),
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_zero_and_one_value_are_spikes(dtype, layout):
    for one, density in ((1.0, 0.3), (2.74, 0.01), (-0.7, 0.3), (3e-5, 1.0)):
        x = layout(one * drawn((6, 16, 10, 12), density, dtype))
        found = look(x)
        assert found.one == x.flatten()[x.abs().argmax()]
        assert found.count == x.count_nonzero()
        assert found.density == pytest.approx(density, abs=0.02)
        assert torch.equal(found.dense(), x)
        assert (found.dense().dtype, found.dense().stride()) == (dtype, x.stride())


@pytest.mark.parametrize("dtype", DTYPES)
def test_minus_zero_is_no_spike(dtype):
    x = -drawn(PACK_FROM, 0.1, dtype)
    assert x.signbit().all()
    assert look(x).count == -x.sum()
    assert look(0 * x).count == 0
    assert look(0 * x).one == 1


@given(st.data())
def test_one_other_element_anywhere_is_seen(data):
    draw = data.draw
    dtype, one = draw(st.sampled_from(DTYPES)), draw(st.sampled_from([1.0, -2.5]))
    n = draw(st.sampled_from([PACK_FROM, PACK_FROM + 8, 3 * PART, 3 * PART + 40]))
    x = one * drawn(n, draw(st.sampled_from([0.001, 0.5, 1.0])), dtype)
    place = draw(st.integers(0, n - 1))
    x[place - 1] = one  # the only spikes may be far from it
    x[place] = draw(st.sampled_from([torch.nan, torch.inf, -one, one / 2, 1.01 * one, 1e-7]))
    with threads(draw(st.sampled_from([1, 3]))):
        assert look(x) is None
        x[place] = 0
        assert torch.equal(look(x).dense(), x)


OTHERS = {"infinity": lambda x: torch.where(x > 0, torch.inf, 0.0)}
OTHERS |= {"not a number": lambda x: torch.where(x > 0, torch.nan, 0.0)}
OTHERS |= {"too small": lambda x: x.flatten()[: PACK_FROM - 8], "no whole byte": lambda x: x.flatten()[: PACK_FROM + 4]}
OTHERS |= {"gaps": lambda x: x[:, ::2], "expanded": lambda x: x[:1].expand(64, 128), "integers": lambda x: x.int()}
OTHERS |= {"booleans": lambda x: x.bool(), "complex": lambda x: x.to(torch.complex64)}
OTHERS |= {"sparse": lambda x: x.to_sparse(), "without values": lambda x: x.to("meta"), "negated": torch._neg_view}


@pytest.mark.parametrize("other", OTHERS.values(), ids=OTHERS)
def test_what_is_left_as_it_is(other):
    assert look(other(drawn((64, 128)))) is None


def test_without_bits_and_inside_a_transform_nobody_looks():
    with kernels.using(bits=False):
        assert look(drawn(PACK_FROM)) is None
    found = []
    torch.func.vmap(lambda x: (found.append(look(x)), x)[1])(drawn((2, PACK_FROM)))
    assert found == [None]


@NATIVE
def test_bits_are_those_that_the_neuron_keeps_as_long_as_the_spikes_are():
    s = sltt.LIF()(torch.randn(4, 16, 64, 8, requires_grad=True)).detach()
    kept = kernels.look(s).bits
    assert kernels.look(s.movedim(1, -1)).bits.data_ptr() == kept.data_ptr()
    s[2:] = 0
    found = kernels.look(s)
    assert found.bits.data_ptr() != kept.data_ptr()
    assert torch.equal(found.dense(), s)
