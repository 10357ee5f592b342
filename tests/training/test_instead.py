from functools import partial

import pytest
import torch
from torch.optim import lr_scheduler

from tests.training.blobs import network, train


def test_an_optimizer_that_was_made_is_refused_with_the_line_to_write(tmp_path):
    with pytest.raises(ValueError, match=r"such as functools.partial\(torch.optim.SGD, lr=0.1\), got AdamW"):
        train(tmp_path / "run", optimizer=torch.optim.AdamW(network().parameters()))


@pytest.mark.parametrize(
    "schedule",
    [
        lr_scheduler.StepLR(torch.optim.SGD(network().parameters()), 3),
        partial(lr_scheduler.StepLR, step_size=3),
        lr_scheduler.StepLR,
    ],
    ids=["made", "partial", "class"],
)
def test_a_scheduler_of_pytorch_is_refused_with_what_to_take_instead(schedule, tmp_path):
    with pytest.raises(ValueError, match=r"must be a Schedule, got .*StepLR.*; take Cosine, Linear, MultiStep"):
        train(tmp_path / "run", schedule=schedule)
