from functools import partial

import pytest
import torch
from torch.optim import lr_scheduler

from tests.training.blobs import network, train


def made(kind=torch.optim.AdamW, **options):
    return kind(network().parameters(), **options)


@pytest.mark.parametrize(
    ("optimizer", "line"),
    [
        (made(lr=0.002), "functools.partial(torch.optim.AdamW, lr=0.002)"),
        (made(torch.optim.SGD, lr=0.5, momentum=0.9), "functools.partial(torch.optim.SGD, lr=0.5, momentum=0.9)"),
        (made(), "functools.partial(torch.optim.AdamW)"),
    ],
)
def test_an_optimizer_that_was_made_is_refused_with_the_line_to_write(optimizer, line, tmp_path):
    with pytest.raises(ValueError, match="a function of the parameters, got an instance of") as error:
        train(tmp_path / "run", optimizer=optimizer)
    assert str(error.value).endswith(f"optimizer={line}")
    factory = eval(line, {"torch": torch, "functools": __import__("functools")})
    assert factory(network().parameters()).defaults == optimizer.defaults


def test_groups_of_an_optimizer_need_a_function(tmp_path):
    layers = network()
    groups = [{"params": layers[0].parameters(), "lr": 0.1}, {"params": layers[4].parameters()}]
    with pytest.raises(ValueError, match="its 2 groups need a function that makes them"):
        train(tmp_path / "run", optimizer=torch.optim.SGD(groups, lr=0.5))


@pytest.mark.parametrize(
    ("schedule", "line"),
    [
        (lambda optim: lr_scheduler.CosineAnnealingLR(optim, 10), r"schedule=sltt.schedules.Cosine\(\)"),
        (lambda optim: lr_scheduler.OneCycleLR(optim, 0.1, 10), r"schedule=sltt.schedules.Cosine\(\)"),
        (lambda optim: lr_scheduler.StepLR(optim, 3, 0.5), r"Step\(range\(3, EPOCHS, 3\), gamma=0.5\)"),
        (lambda optim: lr_scheduler.MultiStepLR(optim, [2, 5]), r"Step\(\[2, 5\], gamma=0.1\)"),
        (lambda optim: lr_scheduler.LambdaLR(optim, float), "derive from sltt.schedules.Schedule"),
        (lambda optim: partial(lr_scheduler.StepLR, step_size=3), "sltt.schedules.Step"),
        (lambda optim: lr_scheduler.CosineAnnealingLR, "sltt.schedules.Cosine"),
    ],
)
def test_a_scheduler_of_pytorch_is_refused_with_the_line_to_write(schedule, line, tmp_path):
    with pytest.raises(ValueError, match=f"schedule must be a Schedule, got PyTorch's .*{line}"):
        train(tmp_path / "run", schedule=schedule(made(torch.optim.SGD, lr=0.1)))
