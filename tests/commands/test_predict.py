import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import sltt
from sltt.commands import main
from sltt.commands.predict import _describe
from sltt.data.recordings import read
from sltt.training.trained import Trained


@pytest.mark.slow
def test_files_are_predicted_as_the_test_samples_are(here, capsys):
    for label, shade in (("cat", 40), ("dog", 200)):
        (here / "images" / label).mkdir(parents=True)
        for i in range(6):
            Image.fromarray(np.full((8, 8, 3), shade + i, np.uint8)).save(here / "images" / label / f"{i}.png")
    words = "digits --data sltt.data.ImageFolder --data.root images --data.test 0.2 --data.size 8 --data.crop_padding 0"
    words += " --model DigitsNet --model.in_channels 3 --model.classes 2 --model.width 4 --epochs 1 --run run"
    assert main(["train", *words.split(), "--device", "cpu"]) == 0
    capsys.readouterr()
    assert main(["predict", "run", "images/cat/0.png", "images/dog/1.png", "--json"]) == 0
    first, second = json.loads(capsys.readouterr().out)
    data, model = sltt.data.ImageFolder("images", size=8, crop_padding=0, test=0.2), sltt.load("run")
    expected = sltt.predict(model, data.read(here / "images/cat/0.png", 4)[None])[0]
    assert first["prediction"] == pytest.approx(expected.tolist())
    assert first["class"] == ["cat", "dog"][int(expected.argmax())]
    assert second["file"] == "images/dog/1.png"
    assert main(["predict", "run", "images/cat/0.png"]) == 0
    assert capsys.readouterr().out.split()[:4] == ["file", "class", "probability", "images/cat/0.png"]


def test_an_array_is_a_sample(here, capsys):
    words = "train sequential-digits --epochs 1 --run run --device cpu --model.features [8,8,10]"
    assert main(words.split()) == 0
    np.save("sample.npy", np.random.rand(8, 8))
    capsys.readouterr()
    assert main(["predict", "run", "sample.npy", "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)
    assert found["class"] in range(10)
    np.savetxt("steps.txt", np.load("sample.npy"), delimiter=",")
    assert main(["predict", "run", "steps.txt", "--stream", "4", "--json"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["step"] for line in lines] == [4, 8]
    assert np.mean([line["prediction"] for line in lines], 0) == pytest.approx(found["prediction"], abs=1e-5)
    Path("steps.txt").write_text("0 " * 8 + "\n1 2 3\n")
    assert main(["predict", "run", "steps.txt", "--stream", "2"]) == 1
    assert "expected the 8 numbers of a time step in line 2, got '1 2 3\\n'" in capsys.readouterr().err
    assert main(["pack", "run"]) == 0
    shutil.rmtree("run")
    capsys.readouterr()
    assert main(["predict", "run.sltt", "sample.npy", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == [found]
    os.rename("run.sltt", "run")
    np.save("batch.npy", np.random.rand(3, 8, 8))
    assert main(["predict", "run", "batch.npy"]) == 1
    assert "expected one sample of [8] values in a file, got [8, 8]" in capsys.readouterr().err
    np.save("bytes.npy", np.full((8, 8), 255, np.uint8))
    assert main(["predict", "run", "bytes.npy"]) == 1
    assert "bytes.npy has whole numbers up to 255: save it as the data has it, in [0, 1] say" in capsys.readouterr().err
    Path("empty.txt").touch()
    assert main(["predict", "run", "empty.txt", "--stream", "2"]) == 1
    assert main(["predict", "run", "sample.csv"]) == 1
    Path("sample.csv").touch()
    assert main(["predict", "run", "sample.npy", "sample.csv"]) == 1
    said = capsys.readouterr()
    assert "empty.txt has no line: expected" in said.err
    assert "No such file or directory: 'sample.csv'" in said.err
    assert "sample.csv: expected a file as SequentialDigits reads them, or .npy" in said.err
    assert said.out.count("sample.npy") == 1  # what was predicted before


def test_a_prediction_without_one_class_has_its_numbers():
    for by, classes, shape in (("mean", None, (1, 3)), ("steps", 2, (4, 1, 2)), ("max", 2, (1, 2, 5, 1))):
        (found,) = _describe(x := torch.rand(shape), Trained(4, False, classes, by), []).values()
        assert np.array_equal(found, x[:, 0] if by == "steps" else x[0])
    assert _describe(torch.eye(5)[4:], Trained(4, False, 3, "mean"), ["a", "b", "c"])["class"] == 4


def test_events_in_arrays(tmp_path):
    """Fields and arrays have t in microseconds, columns x, y, p, t have it in milliseconds."""
    x, y, t, p = np.array([1, 2, 3]), np.array([4, 5, 6]), np.array([1000, 2000, 3000]), np.array([0, 1, 0])
    np.savez(tmp_path / "a.npz", x=x, y=y, t=t, p=p)
    np.save(tmp_path / "b.npy", np.rec.fromarrays([t, x, y, p], names="t,x,y,p"))
    np.save(tmp_path / "c.npy", np.stack([x, y, p, t / 1000], 1))
    for name in ("a.npz", "b.npy", "c.npy"):
        found = read(tmp_path / name, (8, 8), "count", 3)
        assert [part.tolist() for part in found] == [one.tolist() for one in (x, y, t, p)]
    np.savez(tmp_path / "d.npz", x=x, y=y, t=t)
    with pytest.raises(ValueError, match=r"d\.npz: expected arrays x, y, t, p, got x, y, t without p"):
        read(tmp_path / "d.npz", (8, 8), "count", 3)
    data = object.__new__(sltt.data.EventFolder)
    data.summed, data.interpolated, data.slicing, data.sensor = None, None, "count", (8, 8)
    frames = data.read(tmp_path / "a.npz", 3)
    assert frames.shape == (3, 2, 8, 8)
    assert frames.sum() == 3
    assert torch.equal(frames[1].nonzero()[0], torch.tensor([1, 5, 2]))
