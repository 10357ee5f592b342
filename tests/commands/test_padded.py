"""Every command on sequences of several lengths."""

import csv
import json
import re

import pytest
import torch

import sltt
from sltt.data import Data, Splits, from_datasets
from sltt.training.sample import read_sample
from tests.commands.tiny import run


class Recordings(Data):
    """Two classes of sequences [2 … 6, 8]."""

    def load(self, steps: int) -> Splits:
        generator = torch.Generator().manual_seed(0)
        samples = [
            (0.5 * (i % 2) + torch.randn(2 + i % 5, 8, generator=generator), torch.tensor(i % 2)) for i in range(48)
        ]
        train, validation, test = samples[:30], samples[30:40], samples[40:]
        return from_datasets(train, validation, test, static=False, pad=True, by_length=True).splits(steps)


RECIPE = ["sequential-digits", "--data", "tests.commands.test_padded.Recordings", "--model.features", "[8, 16, 2]"]
RECIPE += ["--steps", "6", "--batch_size", "8", "--epochs", "1", "--device", "cpu"]


def found(folder, name):
    return json.loads((folder / "out" / name).read_text())


def test_rules_are_compared_and_one_that_needs_all_steps_is_named(here, capsys):
    code, _, err = run(capsys, "compare", *RECIPE, "--rules", "SLTT:k=4,RateBased", "--save", "out")
    assert code == 1
    assert "RateBased() has mean rates of all steps, and the target is Padded: use SLTT or BPTT" in err
    row, died = found(here, "compare.json")["rows"]
    assert (row["steps"], len(row["scores"]), died["scores"]) == (6, 1, [])
    assert row["cosine"] < 1
    sample = read_sample(here / "out" / row["runs"][0])  # of the report
    assert (len(sample.x), len(sample.logits), sample.label) == (2, 2, 0)


def test_a_profile_is_of_a_batch_of_all_steps(here, capsys):
    code, _, err = run(capsys, "profile", *RECIPE, "--rules", "BPTT,SLTT:fold=1", "--repeats", "1", "--save", "out")
    assert (code, err) == (0, "")
    exact, spatial = found(here, "profile.json")["costs"]
    assert exact["memory"]["input"] == spatial["memory"]["input"] == 4 * 6 * 8 * 8  # float32 [T, B, 8]
    assert spatial["memory"]["saved"] < exact["memory"]["saved"]
    assert spatial["operations"] == exact["operations"]


def test_gradients_agree_as_far_as_they_do(here, capsys):
    # more samples than there are come again, with their lengths
    code, _, err = run(capsys, "agreement", *RECIPE, "--samples", "40", "--save", "out")
    assert (code, err) == (0, "")
    (row,) = found(here, "agreement.json")["rows"]
    assert 0.1 < row["agreement"][0]["cosine"] < 1
    assert " A batch of 8 takes " in row["advice"]


def test_fewer_steps_than_a_sequence_has_are_refused(here, capsys):
    code, _, err = run(capsys, "profile", *RECIPE, "--steps", "4")
    assert code == 1
    assert "has 5 time steps, more than steps=4: set steps=5 or more, or cut it" in err


def test_the_loss_is_that_of_the_real_steps_in_batches_of_any_size():
    torch.manual_seed(0)
    model, data = sltt.models.MLP([8, 16, 2]), Recordings()

    def loss(batch_size):
        return sltt.evaluate(model, data, "train", steps=6, batch_size=batch_size, device="cpu").loss

    assert loss(7) == pytest.approx(loss(30), rel=1e-6)


@pytest.mark.slow
def test_an_export_to_c_is_as_accurate(here, capsys):
    assert run(capsys, "train", *RECIPE, "--run", "run")[0] == 0
    code, shown, err = run(capsys, "export", "run", "--to", "c")
    assert (code, err) == (0, "")
    found = re.search(r"accuracy +([\d.]+)% in C, ([\d.]+)% in PyTorch, on 10 validation", shown)
    (epoch,) = csv.DictReader((here / "run" / "metrics.csv").read_text().splitlines())
    assert {float(one) for one in found.groups()} == {100 * float(epoch["validation_accuracy"])}
