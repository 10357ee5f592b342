"""Spiking Heidelberg Digits: recordings of spikes in an artificial cochlea, without an image plane."""

from pathlib import Path
from typing import Any

import numpy as np

from sltt.checks import flag, folder, number
from sltt.data.base import Data, Splits
from sltt.data.events import FrameDataset, download
from sltt.data.recordings import RecordingError

LONGEST = 100  # seconds: recordings take about one
_REMEDY = "get it again with --data.download true"


class SHD(Data):
    """Spiking Heidelberg Digits (Cramer et al. 2020): spoken digits as spikes of 700 cochlear channels, 20 classes.

    `root/SHD/shd_train.h5` and `shd_test.h5`. Samples are counts [T, 700] of T runs of equal time over `duration`.

    Args:
        root: folder of the data.
        validation: share of the training samples held out to select the best epoch; 0 trains on everything.
        duration: seconds of a sample; later spikes count to the last time step.
        download: fetch the data into `root` where it is not there.
    """

    def __init__(self, root: str = "data", validation: float = 0.1, duration: float = 1.4, download: bool = False):
        super().__init__(validation)
        self.root = folder("root", root)
        self.duration = number("duration", duration, above=0)
        self.download = flag("download", download)

    def load(self, steps: int) -> Splits:
        files = [self._file(name) for name in ("train", "test")]
        if self.download and not all(map(Path.is_file, files)):
            for train in (True, False):
                download(self.root, "SHD", train=train)
        if not all(map(Path.is_file, files)):
            where = f"looked in {self.root.resolve()}, expected SHD/shd_train.h5 and SHD/shd_test.h5 there"
            raise FileNotFoundError(f"SHD not found: {where}. Set --data.root, or get it with --data.download true.")
        samples, test = (self._read(name, steps) for name in ("train", "test"))
        return self.split(samples, samples.targets, test, [*samples.targets, *test.targets], static=False, classes=20)

    def _file(self, name: str) -> Path:
        return self.root / "SHD" / f"shd_{name}.h5"

    def _read(self, name: str, steps: int) -> FrameDataset:
        import h5py

        path = self._file(name)
        try:
            with h5py.File(path, "r") as file:
                data: Any = file
                columns = (list(data[key]) for key in ("labels", "spikes/times", "spikes/units"))
                samples = list(zip(*columns, strict=True))
        except (OSError, KeyError, ValueError) as error:
            raise RecordingError(f"{path}: not a file of SHD ({error}); {_REMEDY}") from error
        counts = np.zeros((len(samples), steps, 700), np.uint16)
        for i, (label, times, units) in enumerate(samples):
            fits = 0 <= label < 20 and len(times) == len(units) > 0 and 0 <= np.min(units) <= np.max(units) < 700
            if not (fits and 0 <= np.min(times) <= np.max(times) < LONGEST):  # False for NaN
                expected = f"a label of 0 … 19, and spikes of units 0 … 699 at times of 0 … {LONGEST} s"
                raise RecordingError(f"{path}: sample {i} is damaged: expected {expected}; {_REMEDY}")
            step = np.minimum(times.astype(np.float64) * steps / self.duration, steps - 1).astype(np.int64)
            np.add.at(counts[i], (step, units.astype(np.int64)), 1)
        return FrameDataset(counts, [int(label) for label, *_ in samples])
