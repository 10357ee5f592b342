"""Long checks, an hour in all, that `make soak` runs: kills, constant memory, damaged checkpoints."""

import contextlib
import gc
import random

import pytest
import torch
from torch import nn

import sltt
from sltt.training.checkpoints import load_checkpoint
from tests.conftest import RULES
from tests.training.blobs import equal, train
from tests.training.test_kills import kill_at_random


def test_two_hundred_kills_change_nothing(tmp_path):
    kill_at_random(tmp_path, 200)


def resident() -> int:
    """Bytes of this process in memory."""
    with open("/proc/self/statm") as file:
        return 4096 * int(file.read().split()[1])


@pytest.mark.parametrize("name", [*RULES, "OTTT(online)"])
def test_three_thousand_iterations_take_constant_memory(name):
    rule = RULES.get(name) or sltt.OTTT(decay=0.5, online=True)
    model = nn.Sequential(
        nn.Linear(6, 256), sltt.LIF(), sltt.Dropout(0.1), nn.Linear(256, 64), sltt.LIF(), nn.Linear(64, 3)
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    loss = sltt.losses.CrossEntropyMSE()

    def update():
        optimizer.step()
        optimizer.zero_grad()

    def iterate(count):
        for _ in range(count):
            x, y = torch.randn(6, 32, 6), torch.randint(3, (32,))
            rule(model, x, y, loss, **({"update": update} if rule.online else {}))
            update()

    iterate(500)
    gc.collect()
    before = resident()
    iterate(2500)
    gc.collect()
    assert resident() < before + 8e6  # a kept graph of an iteration would add 500 MB


def test_bits_flipped_in_a_checkpoint_never_load_as_other_values(tmp_path):
    train(tmp_path / "run", epochs=1)
    path = tmp_path / "run" / "last.ckpt"
    expected, whole = load_checkpoint(path)["model"], path.read_bytes()
    for _ in range(3000):
        place = random.SystemRandom().randrange(8 * len(whole))
        damaged = bytearray(whole)
        damaged[place // 8] ^= 1 << place % 8
        path.write_bytes(damaged)
        with contextlib.suppress(ValueError):
            assert equal(load_checkpoint(path)["model"], expected)
