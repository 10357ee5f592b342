"""Spoken digits as frames of a log-mel spectrogram; the files are read by Python's `wave`.

Shapes: T frames, of 10 ms, C bands.
"""

import logging
import math
import re
import wave
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from sltt.checks import folder, instance, number, whole_number
from sltt.data.base import Data, Splits
from sltt.data.own import from_datasets
from sltt.data.recordings import RecordingError
from sltt.data.series import prepare, standardise

RATE, HOP, WINDOW, FFT = 8000, 80, 200, 256  # samples: of a second, from frame to frame, of a frame, of its spectrum
log = logging.getLogger("sltt")
URL = "https://github.com/Jakobovski/free-spoken-digit-dataset"


class SpokenDigits(Data):
    """The Free Spoken Digit Dataset (Jackson et al.): the digits 0 to 9 by 6 speakers, 3,000 recordings of 8 kHz.

    `root/recordings/DIGIT_SPEAKER_INDEX.wav`. A sample is the sequence [T, C] of its frames of 10 ms, of which those
    beyond the training's `steps` are left out. A frame is log(M p + 10⁻⁶), p the power spectrum of 25 ms and M the bank
    of C mel bands, less its mean over the recording, which is loudness. Each band then has mean 0 and standard
    deviation 1 over the training samples. Shorter samples are padded at the end, with targets `sltt.Padded`.

    Args:
        root: folder of the data: a clone of its repository.
        validation: share of the training samples held out to select the best epoch; 0 trains on everything.
        speaker: whose recordings are the test samples, such as "theo", and train nothing. None is the data set's own
            split, which tests recordings 0 to 4 of each digit and speaker.
        bands: C, at most 64, which the spectrum of 256 samples can tell apart.
        delta: threshold of `Delta`, in standard deviations: the samples are then its spikes [T, 2C]. None gives the
            values themselves, as input current.

    Raises:
        FileNotFoundError: when loaded, no recording is there.
        ValueError: when loaded, a file that is no recording of 8 kHz, or a speaker of whom there is none.
    """

    def __init__(
        self,
        root: str = "data/free-spoken-digit-dataset",
        validation: float = 0.1,
        speaker: str | None = None,
        bands: int = 40,
        delta: float | None = None,
    ):
        super().__init__(validation)
        self.root = folder("root", root)
        self.speaker = None if speaker is None else instance("speaker", speaker, str)
        self.bands = whole_number("bands", bands, least=1, most=64)
        self.delta = None if delta is None else number("delta", delta, above=0)

    def load(self, steps: int) -> Splits:
        named = [(p, re.fullmatch(r"(\d)_(\w+)_(\d+)", p.stem)) for p in sorted(self.root.glob("recordings/*.wav"))]
        recordings = [(path, *name.groups()) for path, name in named if name]
        if not recordings:
            where = f"looked in {self.root.resolve()}, expected recordings/0_theo_7.wav and so on there"
            raise FileNotFoundError(f"SpokenDigits not found: {where}. Get it by git clone {URL}, and set --data.root.")
        speakers = sorted({speaker for _, _, speaker, _ in recordings})
        if self.speaker not in (None, *speakers):
            raise ValueError(f"speaker must be one of {', '.join(speakers)}, or None, got {self.speaker!r}")
        bank, splits = mel_bank(self.bands), ([], [])
        for path, digit, speaker, index in recordings:
            tested = int(index) < 5 if self.speaker is None else speaker == self.speaker
            splits[tested].append((log_mel(read_wav(path), bank)[:steps], int(digit)))
        train, test, statistics = prepare(*splits, self.delta)
        data = from_datasets(train, self.validation, test or None, static=False, classes=10, pad=True)
        return replace(data.splits(steps), statistics=statistics)

    def read(self, path: Path, steps: int) -> Tensor:
        """Read a recording `.wav` as the frames of a sample."""
        if path.suffix != ".wav":
            return super().read(path, steps)
        frames = log_mel(read_wav(path), mel_bank(self.bands))
        if len(frames) > steps:
            log.warning("%s: the first %d of its %d frames of 10 ms count, as in training", path, steps, len(frames))
        return standardise(frames[:steps], self.statistics or self.splits(steps).statistics, self.delta)


def read_wav(path: Path) -> Tensor:
    """Return the samples of a recording, in ±1."""
    try:
        with wave.open(str(path)) as file:
            got = file.getnchannels(), 8 * file.getsampwidth(), file.getframerate(), file.getnframes()
            data = file.readframes(got[-1])
    except (wave.Error, EOFError) as error:
        raise RecordingError(f"{path}: not a wav file ({error}); get it again from {URL}") from error
    if got[:3] != (1, 16, RATE) or len(data) != 2 * got[-1] or got[-1] < FFT:
        expected = f"1 channel of 16 bits at {RATE} Hz, {FFT} samples or more, all of them in the file"
        found = "{} of {} bits at {} Hz, {} samples".format(*got)
        raise RecordingError(f"{path}: expected {expected}, got {found}; convert it, or get it again from {URL}")
    return torch.frombuffer(bytearray(data), dtype=torch.int16) / 2.0**15


def mel_bank(bands: int) -> Tensor:
    """Return triangles over the spectrum [C, FFT/2 + 1], even on the mel scale from 50 Hz on, each of sum 1."""
    low, high = (2595 * math.log10(1 + f / 700) for f in (50, RATE / 2))
    edges = 700 * (10 ** (torch.linspace(low, high, bands + 2, dtype=torch.float64)[:, None] / 2595) - 1)
    (low, middle, high), f = (edges[i : bands + i] for i in range(3)), torch.linspace(0, RATE / 2, FFT // 2 + 1)
    bank = torch.minimum((f - low) / (middle - low), (high - f) / (high - middle)).clamp(min=0)
    return (bank / bank.sum(1, keepdim=True)).float()


def log_mel(samples: Tensor, bank: Tensor) -> Tensor:
    """Return the frames [T, C] of a recording, less their mean."""
    spectrum = torch.stft(samples, FFT, HOP, WINDOW, torch.hann_window(WINDOW), return_complex=True).abs() ** 2
    frames = (bank @ spectrum + 1e-6).log().T
    return frames - frames.mean()
