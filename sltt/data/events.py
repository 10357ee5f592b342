"""Data sets of event cameras, as sequences of frames [T, 2, H, W]; reading them needs the extra `events`.

Events are summed into frames once; the frames are kept in a cache on disk. A data set may be partial: whatever
recordings are there are used. Nothing is downloaded unless `download` is set.
"""

import logging
import shutil
from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from sltt.checks import choice, flag, folder, function, whole_number, whole_numbers
from sltt.data.augment import EventAugmentation
from sltt.data.base import Data, Mapped, Splits
from sltt.data.cache import cache_frames
from sltt.data.recordings import RecordingError, Slicing, frames, read

Resize = Literal["sum", "interpolate"]
OnError = Literal["stop", "skip"]
Recordings = list[tuple[Path, int]]

log = logging.getLogger("sltt")


class FrameDataset(Dataset[Any]):
    """Samples ([T, ...], label) of counts [N, T, ...]; frames [T, 2, h, w] interpolated to a size, if one is given."""

    def __init__(self, counts: Any, targets: list[int], size: int | None = None):
        self.counts, self.targets, self.size = counts, targets, size

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        x = torch.from_numpy(self.counts[index].astype(np.float32))
        if self.size is not None:
            x = F.interpolate(x, (self.size, self.size), mode="bilinear", align_corners=False)
        return x, self.targets[index]


class _Events(Data):
    """Recordings in files, and how they become frames."""

    sensor: tuple[int, int]
    classes: Sequence[str]
    title: str
    folder: str  # under root; tonic's name of the data set too
    layout: str  # where recordings are looked for, for errors
    expected: tuple[int, int]  # training and test recordings of the whole data set
    remedy = "Set --data.root, or get it with --data.download true."

    def __init__(
        self,
        root: str = "data",
        validation: float = 0.1,
        size: int | None = None,
        resize: Resize = "sum",
        slicing: Slicing = "count",
        augment: EventAugmentation | None = None,
        on_error: OnError = "stop",
        cache: str | None = None,
        download: bool = False,
    ):
        """Arguments of the data sets of recordings.

        Args:
            root: folder of the data.
            validation: share of the training recordings held out to select the best epoch; 0 trains on everything.
            size: height and width of the frames in pixels; None is the camera's.
            resize: sum the events that fall into a pixel, or interpolate frames of the camera's size bilinearly, as the
                SLTT paper's code does.
            slicing: T frames of equal event count (the SLTT paper's), or of equal time.
            augment: changes to a training sample, the same in all its frames; None is none.
            on_error: stop at a recording that cannot be used, or skip it, and warn which were.
            cache: folder for the frames; None is `.sltt-cache` under `root`.
            download: fetch the data into `root` where it is not there.
        """
        super().__init__(validation)
        self.root = folder("root", root)
        self.size = None if size is None else whole_number("size", size, least=1)
        self.resize = choice("resize", resize, get_args(Resize))
        self.summed, self.interpolated = (self.size, None) if resize == "sum" else (None, self.size)
        if resize == "interpolate" and size is None:
            raise ValueError("resize='interpolate' changes the size of the frames, but size=None: give a size")
        self.slicing: Slicing = choice("slicing", slicing, get_args(Slicing))
        of = "a sample, such as EventAugmentation(), or None"
        self.augment = None if augment is None else function("augment", augment, of)
        self.on_error = choice("on_error", on_error, get_args(OnError))
        self.cache = self.root / ".sltt-cache" if cache is None else folder("cache", cache)
        self.download = flag("download", download)

    @abstractmethod
    def recordings(self, train: bool) -> Recordings:
        """Return the files of the training or the test recordings, in an order that is the same on every machine."""

    def fetch(self) -> None:
        """Download the data set into `root`."""
        for train in (True, False):
            download(self.root, self.folder, train=train)

    def missing(self) -> dict[str, int]:
        """Count the missing recordings of the whole data set, by split; empty if it is whole."""
        whole = zip(("train", "test"), self.expected, strict=True)
        lost = {name: count - len(self.recordings(name == "train")) for name, count in whole}
        return {name: count for name, count in lost.items() if count > 0}

    def read(self, path: Path, steps: int) -> Tensor:
        """Read a recording as frames [T, 2, H, W]."""
        counts = frames(read(path, self.sensor, self.slicing, steps), steps, self.sensor, self.summed, self.slicing)
        return FrameDataset(counts[None], [0], self.interpolated)[0][0]

    def load(self, steps: int) -> Splits:
        if self.download and not (self.recordings(train=True) and self.recordings(train=False)):
            self.fetch()
        train, test = self.recordings(train=True), self.recordings(train=False)
        if not train:
            raise FileNotFoundError(
                f"{self.title} not found: looked in {self.root.resolve()}, expected {self.layout} there. {self.remedy}"
            )
        if missing := self.missing():
            lost = " and ".join(f"{count} {name} recordings" for name, count in missing.items())
            log.warning("%s is partial: %s not there", self.title, lost)
        samples, names = self._frames(train, steps, "training")
        test_samples, test_names = self._frames(test, steps, "test")
        form: Any = {"static": False, "classes": len(self.classes)}
        augmented, tested = Mapped(samples, self.augment) if self.augment else None, test_samples if test else None
        return self.split(samples, samples.targets, tested, [*names, *test_names], augmented=augmented, **form)

    def _frames(self, recordings: Recordings, steps: int, which: str) -> tuple[FrameDataset, list[str]]:
        """Return the recordings that can be used, and their names."""
        size = self.summed
        height, width = (size, size) if size else self.sensor
        skipped: list[str] = []

        def make(index: int) -> Any:
            try:
                recording = read(recordings[index][0], self.sensor, self.slicing, steps)
            except RecordingError as error:
                if self.on_error == "stop":
                    raise RecordingError(f"{error}. --data.on_error skip leaves such recordings out.") from None
                skipped.append(str(error))
                return None
            return frames(recording, steps, self.sensor, size, self.slicing)

        settings = {"steps": steps, "size": size, "slicing": self.slicing, "sensor": self.sensor, "skip": self.on_error}
        paths = [str(path) for path, _ in recordings]
        shape = (steps, 2, height, width)
        arrays, kept = cache_frames(self.cache, settings, paths, shape, make, f"{self.title}, {which} frames")
        if lost := sorted(set(range(len(paths))) - set(kept)):
            listed = "; ".join(sorted(skipped)[:5]) or ", ".join(paths[i] for i in lost[:5])
            log.warning("%d of %d %s recordings skipped: %s", len(lost), len(paths), which, listed)
        names = [recordings[i][0].relative_to(self.root).as_posix() for i in kept]
        return FrameDataset(arrays, [recordings[i][1] for i in kept], self.interpolated), names


class NMNIST(_Events):
    """N-MNIST (Orchard et al. 2015): handwritten digits seen by a moving camera, 34 × 34 pixels.

    `root/NMNIST/{Train,Test}/LABEL/*.bin`, any number of files.
    """

    sensor = (34, 34)
    classes = tuple(map(str, range(10)))
    title = "N-MNIST"
    folder = "NMNIST"
    layout = "NMNIST/Train/LABEL/*.bin and NMNIST/Test/LABEL/*.bin"
    expected = (60_000, 10_000)

    def recordings(self, train: bool) -> Recordings:
        home = self.root / self.folder / ("Train" if train else "Test")
        return [(path, int(path.parent.name)) for path in sorted(home.glob("[0-9]/*.bin"))]


class DVSGesture(_Events):
    """DVS128 Gesture (Amir et al. 2017): eleven arm gestures, 128 × 128 pixels; trials of 23 users train, of 6 test.

    `root/DVSGesture/{ibmGestureTrain,ibmGestureTest}/USER_LIGHT/LABEL.npy`, as tonic keeps it.
    """

    sensor = (128, 128)
    classes = (
        "hand clapping", "right hand wave", "left hand wave", "right arm clockwise", "right arm counter-clockwise",
        "left arm clockwise", "left arm counter-clockwise", "arm roll", "air drums", "air guitar", "other",
    )  # fmt: skip
    title = "DVS128 Gesture"
    folder = "DVSGesture"
    layout = "DVSGesture/ibmGestureTrain/USER_LIGHT/LABEL.npy and DVSGesture/ibmGestureTest/…"
    expected = (1_077, 264)

    def recordings(self, train: bool) -> Recordings:
        home = self.root / self.folder / ("ibmGestureTrain" if train else "ibmGestureTest")
        files = sorted(home.glob("*/*.npy"))
        return [(path, int(path.stem)) for path in files if path.stem.isdigit() and int(path.stem) < 11]


class CIFAR10DVS(_Events):
    """CIFAR10-DVS (Li et al. 2017): CIFAR-10 images moved in front of a camera, 128 × 128 pixels.

    `root/CIFAR10DVS/CLASS/cifar10_CLASS_N.aedat` or `.aedat4`. There is no official split: as in the SLTT paper, per
    class files 0 to 899 by number train, and 900 to 999 test.
    """

    sensor = (128, 128)
    classes = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
    title = "CIFAR10-DVS"
    folder = "CIFAR10DVS"
    layout = "CIFAR10DVS/CLASS/cifar10_CLASS_N.aedat or .aedat4"
    expected = (9_000, 1_000)

    def recordings(self, train: bool) -> Recordings:
        recordings: Recordings = []
        for label, name in enumerate(self.classes):
            files = [(p.stem.rpartition("_")[2], p) for p in (self.root / self.folder / name).glob("*.aedat*")]
            numbered = sorted((int(number), path) for number, path in files if number.isdigit())
            recordings += [(path, label) for number, path in numbered if (number < 900) == train]
        return recordings

    def fetch(self) -> None:
        download(self.root, self.folder)


class EventFolder(_Events):
    """Any folder of recordings, `root/{train,test}/CLASS/*`: .bin (N-MNIST), .aedat, .aedat4, .npy or .npz.

    Args:
        root: folder of the data.
        sensor: height and width of the camera in pixels.
        kwargs: as for the other data sets of recordings; there is nothing to download.
    """

    title = "the folder of recordings"
    layout = "train/CLASS/* and test/CLASS/*"
    expected = (0, 0)
    remedy = "Set --data.root."

    def __init__(self, root: str, sensor: tuple[int, int], **kwargs: Any):
        super().__init__(root, download=False, **kwargs)
        height, width = whole_numbers("sensor", sensor, least=1)
        self.sensor = (height, width)
        self.classes = sorted(p.name for p in (self.root / "train").glob("[!.]*") if p.is_dir())

    def recordings(self, train: bool) -> Recordings:
        recordings: Recordings = []
        home = self.root / ("train" if train else "test")
        for label, name in enumerate(self.classes):
            files = sorted(p for p in (home / name).glob("[!.]*") if p.is_file())
            if train and not files:
                raise FileNotFoundError(f"the class folder {home / name} has no recordings: add some, or remove it")
            recordings += [(path, label) for path in files]
        if unknown := sorted({p.name for p in home.glob("[!.]*") if p.is_dir()} - set(self.classes)):
            raise ValueError(f"{home} has classes that train does not have: {', '.join(unknown[:5])}: remove them")
        return recordings


def download(root: Path, name: str, **arguments: Any) -> None:
    """Let tonic download its data set `name` beside `root/name`, and move it there when it is whole."""
    try:
        from tonic import datasets
    except ImportError as error:
        raise ImportError("downloading event data needs tonic: pip install 'sltt[events]'") from error
    part = root / f".{name}.part"
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        getattr(datasets, name)(str(part), **arguments)
        for entry in (part / name).iterdir():
            target = root / name / entry.name
            if not target.exists():
                target.parent.mkdir(parents=True, exist_ok=True)
                entry.rename(target)
    finally:
        shutil.rmtree(part, ignore_errors=True)
