from dataclasses import replace

import pytest
import torch
from torch import nn

import sltt
from sltt.data import Data, Splits
from sltt.training.evaluation import views
from sltt.training.phases import Phase
from sltt.training.trained import Trained
from tests.training.blobs import Blobs, network, train


class Images(Data):
    """Twelve images [1, 2, 4] to test, static or [T, 1, 2, 4]."""

    def __init__(self, static):
        super().__init__(validation=0)
        self.static = static

    def load(self, steps):
        x = torch.randn(12, 1, 2, 4, generator=torch.Generator().manual_seed(1))
        samples = [(v if self.static else torch.stack([v, v.flip(0), -v, v]), i % 3) for i, v in enumerate(x)]
        return Splits(samples, None, samples, self.static, 3, "images")


@pytest.mark.parametrize("shape", [(2, 1, 4, 5), (3, 2, 1, 4, 5)], ids=["static", "sequence"])
def test_views_are_the_image_and_what_is_moved_over_its_reflected_border(shape):
    x = torch.arange(float(torch.Size(shape).numel())).reshape(shape)
    seen = views(x, len(shape) == 4, mirror=True, shift=1)
    assert [weight for weight, _ in seen] == [1 / 4, 1 / 4, *[1 / 8] * 4]
    image, mirrored, up, _, down, last = (view for _, view in seen)
    assert torch.equal(image, x)
    assert torch.equal(mirrored, x.flip(-1))
    assert torch.equal(up, x[..., [1, 2, 3, 2], :][..., [1, 2, 3, 4, 3]])
    assert torch.equal(down, x[..., [1, 0, 1, 2], :][..., [1, 0, 1, 2, 3]])
    assert torch.equal(last, down.flip(-1))


@pytest.mark.parametrize("static", [True, False], ids=["static", "sequence"])
def test_mirrored_evaluation_takes_the_mean_logits_of_each_image_and_of_its_mirror_image(static):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(8, 16), sltt.LIF(), nn.Linear(16, 3)).eval()
    samples = Images(static).load(4).test
    x = torch.stack([x for x, _ in samples], 0 if static else 1)
    steps = 4 if static else None
    logits = (sltt.unroll(model, x, steps=steps) + sltt.unroll(model, x[..., [3, 2, 1, 0]], steps=steps)) / 2
    target = torch.tensor([label for _, label in samples])
    loss = torch.nn.functional.cross_entropy
    expected = torch.stack([loss(o, target) for o in logits]).mean().item()
    found = sltt.evaluate(model, Images(static), loss=loss, batch_size=12, device="cpu", mirror=True)
    assert found.loss == pytest.approx(expected, rel=1e-5)
    assert found.accuracy == (logits.mean(0).argmax(1) == target).sum().item() / 12
    assert found.loss != pytest.approx(sltt.evaluate(model, Images(static), loss=loss, device="cpu").loss, rel=1e-3)


@pytest.mark.parametrize("static", [True, False], ids=["static", "sequence"])
def test_samples_that_are_no_images_have_no_mirror_image(static):
    with pytest.raises(ValueError, match="mirror=True needs images"):
        sltt.evaluate(network(), Blobs(static=static), device="cpu", mirror=True)
    with pytest.raises(ValueError, match="shift=1 needs images"):
        sltt.evaluate(network(), Blobs(static=static), device="cpu", shift=1)


class Cut(Blobs):
    def load(self, steps):
        return replace(super().load(steps), fingerprint=f"cut {steps}")


def test_a_split_that_is_not_that_of_the_training_is_told(caplog):
    model, data = network(), Blobs(static=False)
    model.trained = Trained(3, False, 3, split="blobs")
    sltt.evaluate(model, data)
    assert "was trained on the split" not in caplog.text
    sltt.evaluate(model, Cut(static=False))
    assert "was trained on the split blobs, and this is cut 3 of other data: it may know some of" in caplog.text


def test_phases_need_the_same_samples_at_each_t(tmp_path):
    with pytest.raises(ValueError, match="the data has other samples at T = "):
        train(tmp_path / "run", data=Cut(static=False), phases=[Phase(1, steps=2), Phase(1)], steps=4)


class Noisy(Data):
    """Training samples that draw random numbers, with or without the plain ones."""

    def __init__(self, plain):
        super().__init__(validation=0)
        self.plain = plain

    def load(self, steps):
        class Samples(list):
            def __getitem__(self, index):
                x, y = super().__getitem__(index)
                return x + torch.randn(8), y

        samples = [(torch.full((8,), i / 12), i % 3) for i in range(12)]
        return Splits(Samples(samples), None, samples, True, 3, "noisy", plain=samples if self.plain else None)


@pytest.mark.parametrize("plain", [True, False])
def test_training_samples_are_measured_alike_each_time(plain):
    model = nn.Sequential(nn.Linear(8, 8), sltt.LIF(), nn.Linear(8, 3))
    state = torch.get_rng_state()
    first, second = (sltt.evaluate(model, Noisy(plain), "train", device="cpu") for _ in range(2))
    assert first.loss == second.loss
    assert torch.equal(torch.get_rng_state(), state)
    assert (first.loss == sltt.evaluate(model, Noisy(plain), "test", device="cpu").loss) == plain


@pytest.mark.parametrize("measure", ["evaluate", "predict"])
def test_frozen_modules_stay_in_evaluation_mode(measure):
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), sltt.LIF(), nn.Linear(8, 3)).train()
    model[1].eval()
    if measure == "evaluate":
        sltt.evaluate(model, Noisy(True), device="cpu")
    else:
        sltt.predict(model, torch.rand(5, 8), steps=2)
    assert [module.training for module in model] == [True, False, True, True]
