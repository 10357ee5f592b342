import pytest
from hypothesis import given
from hypothesis import strategies as st

from sltt.schedules import Constant, Cosine, Linear, MultiStep


def test_cosine_goes_from_one_to_zero():
    assert [Cosine().factor(e, 10) for e in (0, 5, 10)] == pytest.approx([1, 0.5, 0])


def test_a_line_goes_from_one_to_its_last_factor():
    assert [Linear(last=0.2).factor(e, 10) for e in (0, 5, 10, 15)] == pytest.approx([1, 0.6, 0.2, 0.2])


def test_step_multiplies_at_its_milestones():
    schedule = MultiStep([2, 4], gamma=0.1)
    assert [schedule.factor(e, 6) for e in (0, 1.9, 2, 3.9, 4, 6)] == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01])


@given(warmup=st.floats(0.1, 5), part=st.floats(0, 0.999))
@pytest.mark.parametrize("make", [Constant, Cosine, Linear, lambda warmup: MultiStep([3], warmup=warmup)])
def test_warm_up_is_linear_and_joins_the_decay(make, warmup, part):
    schedule = make(warmup=warmup)
    assert schedule.factor(part * warmup, 10) == pytest.approx(part)
    assert schedule.factor(warmup, 10) == pytest.approx(1)


@given(epoch=st.floats(0, 10), warmup=st.floats(0, 12))
def test_factors_stay_between_zero_and_one(epoch, warmup):
    assert 0 <= Cosine(warmup).factor(epoch, 10) <= 1


def test_a_cosine_stays_at_its_end_after_the_last_epoch():
    assert Cosine().decay(15, 10) == pytest.approx(0)
