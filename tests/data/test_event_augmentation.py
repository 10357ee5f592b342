import pytest
import torch

import sltt
from sltt.data import augment
from sltt.training.batches import EpochSampler, train_loader
from tests.data.recordings import nmnist


@pytest.mark.parametrize(
    "change",
    [augment.flip, lambda x: augment.roll(x, 3), lambda x: augment.rotate(x, 30), lambda x: augment.shear(x, 20),
     lambda x: augment.cutout(x, 9), sltt.data.EventAugmentation(drop=0)],
    ids=["flip", "roll", "rotate", "shear", "cutout", "all"],
)  # fmt: skip
def test_what_moves_a_frame_moves_all_alike(change):
    for seed in range(8):
        torch.manual_seed(seed)
        x = torch.randint(4, (1, 2, 16, 16)).float().expand(5, 2, 16, 16)
        y = change(x)
        assert y.shape == x.shape
        assert (y == y[:1]).all()
        assert set(y.unique().tolist()) <= {0.0, 1.0, 2.0, 3.0}


def test_dropped_events_are_some_of_those_that_were_there():
    x = torch.randint(6, (10, 2, 8, 8)).float()
    still = {"flip": False, "roll": 0, "rotate": 0, "shear": 0, "cutout": 0}
    for drop in (augment.drop_events, augment.drop_time, sltt.data.EventAugmentation(drop=1.0, **still)):
        ys = [drop(x) for _ in range(10)]
        assert all((y <= x).all() and (y >= 0).all() for y in ys)
        assert all(y.sum() < x.sum() for y in ys)
    assert torch.equal(sltt.data.EventAugmentation(drop=0.0, **still)(x), x)


def test_augmentation_is_the_same_for_any_number_of_workers(tmp_path):
    splits = sltt.data.NMNIST(str(nmnist(tmp_path)), augment=sltt.data.EventAugmentation(drop=0.5)).splits(3)
    assert not torch.equal(splits.train[0][0], splits.train[0][0])
    assert torch.equal(splits.plain[0][0], splits.plain[0][0])
    batches = []
    for workers in (0, 2):
        loader = train_loader(splits, 8, EpochSampler(len(splits.train), 0), workers)
        batches.append([x for x, _ in loader])
    assert all(torch.equal(a, b) for a, b in zip(*batches, strict=True))


@pytest.mark.parametrize("frame", [1.0, 0.4, 2.5])
def test_interpolated_frames_lose_events_alike(frame):
    torch.manual_seed(0)
    x = torch.full((4, 2, 50, 50), frame)
    kept = torch.stack([augment.drop_events(x, 0.5).mean() / frame for _ in range(60)])
    assert kept.mean() == pytest.approx(0.75, abs=0.05)  # 1 − half of `most` in the mean
    assert kept.min() < 0.6


def test_short_sequences_do_not_lose_all_their_frames():
    assert all(augment.drop_time(torch.ones(steps, 2, 3, 3)).any() for steps in (1, 2, 3, 4) for _ in range(10))
