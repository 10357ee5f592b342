"""Spike codes: their equations, and what they draw whatever the workers and processes."""

import pytest
import torch
from PIL import Image

import sltt
from sltt.data import Classes, Delta, Digits, Encoded, ImageFolder, Latency, Poisson
from sltt.training.batches import EpochSampler, train_loader

RANGE = {"low": -0.82, "high": 1.85}  # of the normalised digits


def test_a_poisson_code_fires_as_often_as_the_intensity_says():
    x = torch.linspace(2, 6, 9)
    spikes = Poisson(low=2, high=6)(x, 4000)
    assert spikes.shape == (4000, 9)
    assert set(spikes.unique().tolist()) == {0.0, 1.0}
    torch.testing.assert_close(spikes.mean(0), torch.linspace(0, 1, 9), atol=0.04, rtol=0)
    centred = spikes[:, 4] - spikes[:, 4].mean()
    assert (centred[1:] * centred[:-1]).mean().abs() < 0.02  # anew at every time step


@pytest.mark.parametrize("steps", [1, 2, 5, 9])
def test_a_latency_code_fires_once_the_earlier_the_stronger(steps):
    x = torch.tensor([[0.0, 0.01, 0.3], [0.5, 0.8, 1.0]])
    spikes = Latency()(x, steps)
    assert torch.equal(spikes.sum(0), (x > 0).float())
    for share, train in zip(x.flatten().tolist()[1:], spikes.flatten(1).T[1:], strict=True):
        assert int(train.argmax()) == round((1 - share) * (steps - 1))


def test_a_delta_code_follows_the_signal_within_its_threshold():
    x = torch.cumsum(0.05 * torch.randn(60, 2, 3), 0)
    spikes = Delta(0.1)(x, 60)
    assert spikes.shape == (60, 4, 3)
    assert set(spikes.unique().tolist()) == {0.0, 1.0}
    assert not (spikes[:, :2] * spikes[:, 2:]).any()
    reference = x[0].clone()
    for t in range(60):
        change = x[t] - reference
        assert torch.equal(spikes[t, :2], (change >= 0.1).float())
        assert torch.equal(spikes[t, 2:], (change <= -0.1).float())
        reference = reference + 0.1 * (spikes[t, :2] - spikes[t, 2:])
    assert (reference - x[-1]).abs().max() < 0.2


def batches(data, rank=0, processes=1, workers=0, epoch=0):
    splits = data.splits(3)
    sampler = EpochSampler(len(splits.train), seed=5)
    sampler.set_epoch(epoch, start=len(splits.train) - 40)
    return list(train_loader(splits, 20, sampler, workers, rank=rank, processes=processes))


def test_the_same_spikes_in_one_process_and_in_two_and_with_workers():
    data = Encoded(Digits(), Poisson(**RANGE))
    one, first, second = batches(data), batches(data, 0, 2), batches(data, 1, 2)
    torch.manual_seed(99)  # what was drawn before does not count
    again, worker, other = batches(data), batches(data, workers=1), batches(data, epoch=1)
    for i, (x, y) in enumerate(one):
        assert x.shape == (3, 20, 1, 8, 8)
        for (found, labels), share in ((first[i], slice(0, None, 2)), (second[i], slice(1, None, 2))):
            assert torch.equal(found, x[:, share])
            assert torch.equal(labels, y[share])
        assert torch.equal(again[i][0], x)
        assert torch.equal(worker[i][0], x)
        assert not torch.equal(other[i][0], x)


def test_what_is_evaluated_is_coded_alike_every_time_and_draws_nothing_of_the_run():
    plain, coded = Digits().splits(3), Encoded(Digits(), Poisson(**RANGE)).splits(3)
    assert coded.fingerprint == plain.fingerprint
    assert not coded.static
    for before, after in ((plain.validation, coded.validation), (plain.test, coded.test)):
        state = torch.get_rng_state()
        assert torch.equal(after[4][0], after[4][0])
        assert torch.equal(torch.get_rng_state(), state)
        assert after[4][1] == before[4][1]
        assert len(after) == len(before)
    x, again = coded.train[4][0], coded.train[4][0]
    assert not torch.equal(x, again)
    same = Encoded(
        sltt.data.from_datasets([(torch.full((9,), 0.5), 0)] * 2, test=[(torch.full((9,), 0.5), 0)] * 2, static=True),
        Poisson(),
    )
    assert not torch.equal(*(same.splits(20).test[i][0] for i in range(2)))  # each sample for itself


def test_coded_digits_train_like_others(tmp_path):
    data = Encoded(Digits(), Latency(**RANGE))
    model = sltt.models.DigitsNet(width=4, neuron=lambda: sltt.LIF(tau=2.0))
    result = sltt.fit(model, data, sltt.SLTT(), steps=4, epochs=1, batch_size=256, device="cpu", run=tmp_path / "run")
    assert result.history[0]["train_loss"] < 2.4


def test_codes_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match="Poisson does not code the sequences of SequentialDigits: use Delta"):
        Encoded(sltt.data.SequentialDigits(), Poisson()).splits(8)
    with pytest.raises(ValueError, match="Delta does not code the images of Digits: use Poisson or Latency"):
        Encoded(Digits(), Delta()).splits(4)
    with pytest.raises(ValueError, match=r"intensities in 0 … 1, got -.* give low=… and high"):
        Encoded(Digits(), Latency()).splits(4).train[0]
    several = sltt.data.from_datasets([(torch.rand(n, 3), 0) for n in (3, 4)], None, static=False, pad=True)
    assert [len(x) for x, _ in Encoded(several, Delta()).splits(4).train] == [3, 4]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("steps", [300, 5000])
def test_codes_of_other_types_are_those_of_float32(dtype, steps):
    images = torch.tensor([0, 3, 100, 255], dtype=dtype)
    code = Latency(high=255.0)(images, steps)
    assert code.dtype == dtype
    assert code.float().sum(0).tolist() == [0, 1, 1, 1]
    assert torch.equal(code.float(), Latency(high=255.0)(images.float(), steps))
    signal = torch.tensor([[5.0], [3.0], [9.0], [9.0]])
    assert torch.equal(Delta(1.0)(signal.to(dtype), 4).float(), Delta(1.0)(signal, 4))
    assert Poisson(high=255.0)(images, 3).dtype == dtype


def test_a_file_is_read_as_the_samples_of_the_data_are(tmp_path):
    for label in "abc":
        for i in range(4):
            (tmp_path / label).mkdir(exist_ok=True)
            Image.new("RGB", (8, 8), (60 * i, 90, 7)).save(tmp_path / label / f"{i}.png")
    images = ImageFolder(str(tmp_path), test=0.25, size=8, crop_padding=0, augment=False)
    data = Encoded(Classes(images, [2, 0]), Latency(low=-3.0, high=3.0))
    samples = data.splits(5).train
    files = [tmp_path / label / f"{i}.png" for label in "ac" for i in range(4)]
    read = [data.read(path, 5) for path in files]
    assert all(any(torch.equal(x, one) for one in read) for x, _ in samples)
