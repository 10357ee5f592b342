import json
import math
import shutil
import sys
import wave
from collections import Counter

import numpy as np
import pytest
import torch

import sltt
from sltt.commands import main
from sltt.data import Delta, SpokenDigits, TimeSeries
from sltt.data.recordings import RecordingError
from sltt.data.series import prepare
from sltt.data.speech import log_mel, mel_bank, read_wav


def samples(*lengths):
    return [(3 + 2 * torch.randn(length, 2, dtype=torch.float64), i % 2) for i, length in enumerate(lengths)]


def test_channels_are_standardised_by_the_training_samples(tmp_path):
    train, test, data = samples(5, 8, 6), samples(9), TimeSeries()
    changed, other, data.statistics = prepare(train, test, None)
    np.savetxt(tmp_path / "test.csv", test[0][0], delimiter=",")
    assert torch.equal(data.read(tmp_path / "test.csv", 9), other[0][0])
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
    for coded, values in zip(prepare(train, test, 0.5)[:2], prepare(train, test, None)[:2], strict=True):
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


def record(path, samples=4000, channels=1, rate=8000):
    """Write noise of 16 bits as a wav file; return it."""
    path.parent.mkdir(exist_ok=True)
    noise = np.random.default_rng(samples).integers(-9000, 9000, samples * channels).astype("<i2")
    with wave.open(str(path), "wb") as file:
        file.setparams((channels, 2, rate, 0, "NONE", ""))
        file.writeframes(noise.tobytes())
    return noise


@pytest.fixture
def spoken(tmp_path):
    """Two digits by two speakers, 8 recordings of each; those of index i have 21 + i frames."""
    for digit, speaker, i in ((d, s, i) for d in "07" for s in ("ann", "bo_b") for i in range(8)):
        record(tmp_path / f"recordings/{digit}_{speaker}_{i}.wav", 1600 + 80 * i)
    record(tmp_path / "recordings/notes.wav")
    return tmp_path


def test_spoken_digits_are_split_by_index_or_by_speaker(spoken):
    splits = SpokenDigits(str(spoken), validation=0.25).splits(60)
    assert (splits.classes, tuple(splits.sizes.values())) == (10, (8, 4, 20))
    assert {len(x) for x, _ in splits.test} == {21, 22, 23, 24, 25}
    train = [*splits.train, *splits.validation]
    assert {len(x) for x, _ in train} == {26, 27, 28}
    values = torch.cat([x for x, _ in train])
    torch.testing.assert_close((values.mean(0), values.std(0)), (torch.zeros(40), torch.ones(40)), atol=1e-5, rtol=0)
    x, target = splits.collate([splits.test[0], splits.test[4]])
    assert (x.shape, target.lengths, [*target.target]) == ((25, 2, 40), (21, 25), [0, 0])
    by = SpokenDigits(str(spoken), 0.0, "bo_b", bands=8, delta=0.5).splits(22)
    assert tuple(by.sizes.values()) == (16, 0, 16)
    assert {x.shape for x, _ in by.train} == {(21, 16), (22, 16)}  # what is longer is cut
    assert {*by.train[0][0].flatten().tolist()} == {0.0, 1.0}
    with pytest.raises(ValueError, match="speaker must be one of ann, bo_b, or None, got 'bob'"):
        SpokenDigits(str(spoken), speaker="bob").splits(22)


def test_a_packed_run_predicts_and_exports_without_its_data(spoken, monkeypatch, capsys, caplog):
    monkeypatch.chdir(spoken)
    words = "speech --data.root . --epochs 1 --steps 25 --model.features [40,8,10] --model.delays [null] --device cpu"
    assert main(["train", *words.split(), "--run", "run"]) == 0
    SpokenDigits(".").read(spoken / "recordings/0_ann_2.wav", 22)
    assert "the first 22 of its 23 frames of 10 ms count" in caplog.text
    splits, model, wav = SpokenDigits(".").splits(25), sltt.load("run"), "0_ann_2.wav"
    expected = sltt.predict(model, splits.test[2][0][:, None])[0]
    assert main(["pack", "run"]) == 0
    assert main(["pack", "run"]) == 1
    assert "run.sltt exists, and may be of another run: remove it, or name another" in capsys.readouterr().err
    (spoken / "recordings" / wav).rename(wav)
    shutil.rmtree("recordings")
    for run in ("run", "run.sltt"):
        assert main(["predict", run, wav, "--json"]) == 0
        assert json.loads(capsys.readouterr().out)[0]["prediction"] == pytest.approx(expected.tolist(), abs=1e-5)
        assert main(["export", run, "--to", "c"]) == 0
        assert "warning: the data is not here" in capsys.readouterr().out
    assert all((spoken / home / "c").is_dir() for home in (".", "run"))


def test_frames_are_those_by_hand(tmp_path):
    x = record(tmp_path / "a.wav", 1000) / 2.0**15
    torch.testing.assert_close(read_wav(tmp_path / "a.wav"), torch.from_numpy(x), check_dtype=False)
    padded, window = np.pad(x, 128, "reflect"), np.pad(0.5 - 0.5 * np.cos(2 * np.pi * np.arange(200) / 200), 28)
    mels = np.linspace(*(2595 * math.log10(1 + f / 700) for f in (50, 4000)), 12)
    edges, f = 700 * (10 ** (mels / 2595) - 1), 31.25 * np.arange(129)
    bank = np.stack([np.interp(f, edges[i : i + 3], [0, 1, 0]) for i in range(10)])
    bank /= bank.sum(1, keepdims=True)
    power = np.stack([abs(np.fft.rfft(window * padded[t : t + 256])) ** 2 for t in range(0, 1001, 80)])
    frames, found = np.log(power @ bank.T + 1e-6), log_mel(read_wav(tmp_path / "a.wav"), mel_bank(10)).double()
    torch.testing.assert_close(found, torch.from_numpy(frames - frames.mean()), rtol=1e-3, atol=1e-3)
    assert (mel_bank(64).sum(1) > 0.99).all()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: record(path, channels=2), "expected 1 channel .* 8000 Hz.* got 2 of 16 bits at 8000 Hz, 4000"),
        (lambda path: record(path, rate=16000), "got 1 of 16 bits at 16000 Hz"),
        (lambda path: path.write_bytes(path.read_bytes()[:-100]), "all of them in the file"),
        (lambda path: path.write_bytes(b"RIFF"), "not a wav file .*get it again from https://github.com"),
    ],
)
def test_damaged_recordings_are_named(damage, message, spoken):
    damage(spoken / "recordings/7_bo_b_3.wav")
    with pytest.raises(RecordingError, match=f"7_bo_b_3.wav: .*{message}"):
        SpokenDigits(str(spoken)).splits(30)
    with pytest.raises(FileNotFoundError, match=r"expected recordings/0_theo_7.wav .*git clone"):
        SpokenDigits(str(spoken / "recordings")).splits(30)
