"""Spoken digits in ten minutes of audio: a decision every 100 ms, by a run of the recipe `speech`.

    sltt train speech --data.root data/free-spoken-digit-dataset --run runs/speech
    python benchmarks/stream.py runs/speech [--data.root …] [--minutes 10] [--rate 0.1] [--train]

Test recordings follow each other, with half a second of faint noise between them; with --train, those of the training,
by which `--rate` was chosen. The network decides by its mean logits since speech began. A recording counts as right if
the last decision in it is its digit.
"""

import argparse
import resource
import statistics
import time
from pathlib import Path

import torch
from torch import Tensor

import sltt
from sltt.data.speech import FFT, HOP, RATE, WINDOW, mel_bank, read_wav

STEPS = 10  # of 10 ms in a chunk


class Frames:
    """Log-mel frames of audio as it comes, standardised as those of the training.

    Loudness, the mean over a recording in the training, is here a running mean over frames that are no silence.
    """

    def __init__(self, recordings: list[Tensor], rate: float):
        self.bank, self.rate = mel_bank(40), rate
        frames = [self.log_mel(one) for one in recordings]
        loudness = torch.stack([one.mean() for one in frames])
        values = torch.cat([(one - one.mean())[:60] for one in frames])
        self.mean, self.std = values.mean(0), values.std(0)
        self.loudness, self.silence = loudness.mean(), loudness.mean() - 4
        self.rest = torch.zeros(FFT - HOP)

    def log_mel(self, samples: Tensor) -> Tensor:
        spectrum = torch.stft(samples, FFT, HOP, WINDOW, torch.hann_window(WINDOW), center=False, return_complex=True)
        return (self.bank @ spectrum.abs() ** 2 + 1e-6).log().T

    def __call__(self, samples: Tensor) -> tuple[Tensor, bool]:
        """Return the frames [n, 40] of n · 80 further samples, and whether most are no silence."""
        samples = torch.cat([self.rest, samples])
        self.rest = samples[HOP - FFT :]
        frames = self.log_mel(samples)
        loud = frames.mean(1)
        for i, level in enumerate(loud):
            if level > self.silence:
                self.loudness += self.rate * (level - self.loudness)
            frames[i] -= self.loudness
        return (frames - self.mean) / self.std, bool((loud > self.silence).float().mean() > 0.5)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run")
    parser.add_argument("--data.root", dest="root", type=Path, default=Path("data/free-spoken-digit-dataset"))
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--rate", type=float, default=0.1, help="of the running mean of loudness, for each frame")
    parser.add_argument("--train", action="store_true")
    asked = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    files = sorted(asked.root.glob("recordings/*.wav"))
    test = [path for path in files if int(path.stem.split("_")[2]) < 5]
    known = [path for path in files if path not in test]
    frames = Frames([read_wav(path) for path in known], asked.rate)
    played = known if asked.train else test
    parts, spans, at = [], [], 0  # spans in chunks
    while at < asked.minutes * 60 * RATE:
        path = played[int(torch.randint(len(played), ()))]
        spoken, gap = read_wav(path), 3e-4 * torch.randn(RATE // 2)
        spans.append(((at + len(gap)) / HOP / STEPS, (at + len(gap) + len(spoken)) / HOP / STEPS, int(path.stem[0])))
        parts += [gap, spoken]
        at += len(gap) + len(spoken)
    stream, decisions, seconds, memory = sltt.Stream(sltt.load(asked.run)), [], [], []
    word: list[Tensor] = []
    for chunk in torch.cat(parts).split(HOP * STEPS):
        if len(chunk) < HOP * STEPS:
            break
        begin = time.perf_counter()
        x, speaks = frames(chunk)
        if not word:
            stream.reset()
        logits = stream(x[:, None])[:, 0]
        word = [*word, logits] if speaks else []  # since it began
        decisions.append(int(torch.cat(word).mean(0).argmax()) if word else None)
        seconds.append(time.perf_counter() - begin)
        memory.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    right = 0
    for start, end, digit in spans:
        during = [d for d in decisions[int(start) : int(end) + 1] if d is not None]
        right += during[-1:] == [digit]
    silent = [d for d in decisions if d is None]
    print(f"{len(decisions)} decisions, {len(silent)} of them silence; {right / len(spans):.1%} of {len(spans)} digits")
    print(f"{1e3 * statistics.median(seconds):.1f} ms for 100 ms of audio, at most {1e3 * max(seconds):.1f} ms")
    print(f"peak memory {memory[100] / 1e3:.1f} MB after 10 s, {memory[-1] / 1e3:.1f} MB at the end")


if __name__ == "__main__":
    main()
