import pytest
import torch

import sltt
from sltt.training.batches import EpochSampler, train_loader
from tests.data.recordings import nmnist

OFF = {"flip": False, "roll": 0, "rotate": 0, "shear": 0, "cutout": 0}


@pytest.mark.parametrize(
    "how",
    [{**OFF, "flip": True}, {**OFF, "roll": 3}, {**OFF, "rotate": 30}, {**OFF, "shear": 20}, {**OFF, "cutout": 9}, {}],
    ids=["flip", "roll", "rotate", "shear", "cutout", "all"],
)  # fmt: skip
def test_what_moves_a_frame_moves_all_alike(how):
    change, moved = sltt.data.EventAugmentation(**how), 0
    for seed in range(8):
        torch.manual_seed(seed)
        x = torch.randint(4, (1, 2, 16, 16)).float().expand(5, 2, 16, 16)
        y = change(x)
        assert y.shape == x.shape
        assert (y == y[:1]).all()
        moved += not torch.equal(x, y)
        assert set(y.unique().tolist()) <= {0.0, 1.0, 2.0, 3.0}
    assert moved


def test_augmentation_is_the_same_for_any_number_of_workers(tmp_path):
    splits = sltt.data.NMNIST(str(nmnist(tmp_path)), augment=sltt.data.EventAugmentation()).splits(3)
    assert not torch.equal(splits.train[0][0], splits.train[0][0])
    assert torch.equal(splits.plain[0][0], splits.plain[0][0])
    batches = []
    for workers in (0, 2):
        loader = train_loader(splits, 8, EpochSampler(len(splits.train), 0), workers)
        batches.append([x for x, _ in loader])
    assert all(torch.equal(a, b) for a, b in zip(*batches, strict=True))
