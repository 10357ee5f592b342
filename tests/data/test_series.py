import sys
from collections import Counter

import pytest
import torch

import sltt
from sltt.data import Delta, TimeSeries
from sltt.data.series import prepare


def samples(*lengths):
    return [(3 + 2 * torch.randn(length, 2, dtype=torch.float64), i % 2) for i, length in enumerate(lengths)]


def test_channels_are_standardised_by_the_training_samples():
    train, test = samples(5, 8, 6), samples(9)
    changed, other = prepare(train, test, None)
    values = torch.cat([x for x, _ in changed])
    torch.testing.assert_close(values.mean(0), torch.zeros(2), atol=1e-6, rtol=0)
    torch.testing.assert_close(values.std(0), torch.ones(2))
    scale = torch.cat([x for x, _ in train]).std(0)
    torch.testing.assert_close(
        (other[0][0][1:] - other[0][0][:-1]) * scale, test[0][0].diff(dim=0).float(), check_dtype=False
    )
    assert [y for _, y in changed] == [0, 1, 0]


def test_spikes_are_those_of_the_standardised_values():
    train, test = samples(5, 8), samples(9)
    for coded, values in zip(prepare(train, test, 0.5), prepare(train, test, None), strict=True):
        for (spikes, _), (x, _) in zip(coded, values, strict=True):
            assert torch.equal(spikes, Delta(0.5)(x, len(x)))
            assert spikes.any()


@pytest.mark.parametrize(
    ("name", "sizes", "shape", "classes"),
    [("JapaneseVowels", (216, 54, 370), (29, 12), 9), ("BasicMotions", (32, 8, 40), (100, 6), 4)],
)
def test_the_archive_has_its_splits(name, sizes, shape, classes):
    pytest.importorskip("aeon")
    splits = TimeSeries(name).splits(shape[0])
    assert tuple(splits.sizes.values()) == sizes
    assert splits.classes == classes
    lengths = [len(x) for part in (splits.train, splits.validation, splits.test) for x, _ in part]
    assert max(lengths) == shape[0]
    assert set(Counter(y for _, y in splits.validation).values()) == {sizes[1] // classes}
    x, target = splits.collate([splits.train[i] for i in range(4)])
    assert x.shape[1:] == (4, shape[1])
    assert isinstance(target, sltt.Padded) is (min(lengths) < max(lengths)) is (name == "JapaneseVowels")
    assert TimeSeries(name, delta=0.5).splits(shape[0]).train[0][0].shape[1] == 2 * shape[1]


def test_without_aeon_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "aeon.datasets", None)
    with pytest.raises(ImportError, match=r"JapaneseVowels comes with aeon: pip install 'sltt\[timeseries\]'"):
        TimeSeries().splits(29)
