"""Data sets of event cameras, as sequences of frames [T, 2, H, W]; reading them needs the extra `events`.

Events are summed into frames once; the frames are kept in a cache on disk. A data set may be partial: whatever
recordings are there are used. Nothing is downloaded unless `download` is set.
"""

import importlib.util
import logging
import shutil
from abc import abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from sltt.checks import choice, flag, folder, whole_number, whole_numbers
from sltt.data.augment import EventAugmentation
from sltt.data.base import Data, OnError, Splits, fingerprint, hold_out
from sltt.data.cache import cached
from sltt.data.recordings import RecordingError, Slicing, frames, read

Resize = Literal["sum", "interpolate"]
Recordings = list[tuple[Path, int]]

log = logging.getLogger("sltt")


class _Events(Data):
    """Recordings in files, and how they become frames."""

    sensor: tuple[int, int]
    classes: Sequence[str]
    title: str
    expected: tuple[int, int]  # training and test recordings of the whole data set

    def __init__(
        self,
        root: str = "data",
        validation: float = 0.1,
        split_seed: int = 0,
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
            split_seed: which training recordings are held out.
            size: height and width of the frames in pixels; None is the camera's.
            resize: sum the events that fall into a pixel, or interpolate frames of the camera's size bilinearly, as the
                SLTT paper's code does.
            slicing: T frames of equal event count (the paper's), or of equal time.
            augment: changes to a training sample, the same in all its frames; None is none.
            on_error: stop at a recording that cannot be used, or skip it, and warn which were.
            cache: folder for the frames; None is `.sltt-cache` under `root`.
            download: fetch the data into `root` where it is not there.
        """
        super().__init__(validation, split_seed)
        self.root = folder("root", root)
        self.size = None if size is None else whole_number("size", size, least=1)
        self.resize = choice("resize", resize, get_args(Resize))
        if resize == "interpolate" and size is None:
            raise ValueError("resize='interpolate' changes the size of the frames, but size=None: give a size")
        self.slicing: Slicing = choice("slicing", slicing, get_args(Slicing))
        if augment is not None and not callable(augment):
            raise ValueError(
                f"augment must be a function of a sample, such as EventAugmentation(), or None, got {augment!r}"
            )
        self.augment = augment
        self.on_error = choice("on_error", on_error, get_args(OnError))
        self.cache = self.root / ".sltt-cache" if cache is None else folder("cache", cache)
        self.download = flag("download", download)

    @abstractmethod
    def recordings(self, train: bool) -> Recordings:
        """The files of the training or the test recordings, in an order that is the same on every machine."""

    def fetch(self) -> None:
        """Download the data set into `root`."""
        raise ValueError(f"{self.title} cannot be downloaded; put it into {self.root.resolve()}")

    def layout(self) -> str:
        """Where recordings are looked for, for errors."""
        raise NotImplementedError

    def missing(self) -> dict[str, int]:
        """How many recordings of the whole data set are not there, by split; empty if it is whole."""
        found = {name: len(self.recordings(name == "train")) for name in ("train", "test")}
        counts = dict(zip(("train", "test"), self.expected, strict=True))
        return {name: counts[name] - found[name] for name in counts if found[name] < counts[name]}

    def load(self, steps: int) -> Splits:
        if self.download and not self.recordings(train=True):
            self.fetch()
        train, test = self.recordings(train=True), self.recordings(train=False)
        if not train:
            raise FileNotFoundError(
                f"{self.title} not found: looked in {self.root.resolve()}, expected {self.layout()}. "
                "Set --data.root, or get it with --data.download true."
            )
        if missing := self.missing():
            log.warning(
                "%s is partial: %s not there",
                self.title,
                " and ".join(f"{n} {k} recordings" for k, n in missing.items()),
            )
        x, labels, names = self._frames(train, steps, "training")
        held_x, held_labels, held_names = self._frames(test, steps, "test")
        kept, held = hold_out(labels, self.validation, self.split_seed)
        return Splits(
            train=FrameDataset(x, labels, kept, self._ready, self.augment),
            validation=FrameDataset(x, labels, held, self._ready) if held else None,
            test=FrameDataset(held_x, held_labels, range(len(held_labels)), self._ready) if test else None,
            static=False,
            classes=len(self.classes),
            fingerprint=fingerprint([*names, *held_names], kept, held),
            plain=FrameDataset(x, labels, kept, self._ready),
        )

    def _frames(self, recordings: Recordings, steps: int, which: str) -> tuple[Any, list[int], list[str]]:
        """Frames [N, T, 2, H, W], labels and names of the recordings that can be used."""
        size = self.size if self.resize == "sum" else None
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
        arrays, mark = cached(self.cache, settings, paths, shape, make, f"{self.title}, {which} frames")
        kept = mark["kept"]
        if lost := sorted(set(range(len(paths))) - set(kept)):
            listed = "; ".join(sorted(skipped)[:5]) or ", ".join(paths[i] for i in lost[:5])
            log.warning("%d of %d %s recordings skipped: %s", len(lost), len(paths), which, listed)
        names = [recordings[i][0].relative_to(self.root).as_posix() for i in kept]
        return arrays, [recordings[i][1] for i in kept], names

    def _ready(self, counts: Any) -> Tensor:
        """Counts [T, 2, h, w] to what the network sees."""
        x = torch.from_numpy(counts.astype(np.float32))
        if self.resize == "interpolate" and self.size is not None:
            x = F.interpolate(x, (self.size, self.size), mode="bilinear", align_corners=False)
        return x


class FrameDataset(Dataset[Any]):
    """Samples ([T, 2, H, W], label) of cached frames.

    Args:
        counts: frames of all recordings, [N, T, 2, h, w].
        labels: of all recordings.
        indices: which of them are in this data set.
        ready: makes counts of one recording into the sample.
        augment: changes a sample.
    """

    def __init__(
        self,
        counts: Any,
        labels: Sequence[int],
        indices: Sequence[int],
        ready: Callable[[Any], Tensor],
        augment: Callable[[Tensor], Tensor] | None = None,
    ):
        self.counts, self.labels, self.indices = counts, labels, indices
        self.ready, self.augment = ready, augment

    @property
    def targets(self) -> list[int]:
        """The label of each sample."""
        return [self.labels[i] for i in self.indices]

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        i = self.indices[index]
        x = self.ready(self.counts[i])
        return (self.augment(x) if self.augment else x), self.labels[i]


class NMNIST(_Events):
    """N-MNIST (Orchard et al. 2015): handwritten digits seen by a moving camera, 34 × 34 pixels.

    `root/NMNIST/{Train,Test}/LABEL/*.bin`, any number of files.
    """

    sensor = (34, 34)
    classes = tuple(map(str, range(10)))
    title = "N-MNIST"
    expected = (60_000, 10_000)

    def layout(self) -> str:
        return "NMNIST/Train/LABEL/*.bin and NMNIST/Test/LABEL/*.bin there"

    def recordings(self, train: bool) -> Recordings:
        home = self.root / "NMNIST" / ("Train" if train else "Test")
        return [(path, int(path.parent.name)) for path in sorted(home.glob("[0-9]/*.bin"))]

    def fetch(self) -> None:
        from tonic import datasets

        for train in (True, False):
            download(self.root, "NMNIST", lambda part, train=train: datasets.NMNIST(part, train=train))


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
    expected = (1_077, 264)

    def layout(self) -> str:
        return "DVSGesture/ibmGestureTrain/USER_LIGHT/LABEL.npy and DVSGesture/ibmGestureTest/… there"

    def recordings(self, train: bool) -> Recordings:
        home = self.root / "DVSGesture" / ("ibmGestureTrain" if train else "ibmGestureTest")
        files = sorted(home.glob("*/*.npy"))
        return [(path, int(path.stem)) for path in files if path.stem.isdigit() and int(path.stem) < 11]

    def fetch(self) -> None:
        from tonic import datasets

        for train in (True, False):
            download(self.root, "DVSGesture", lambda part, train=train: datasets.DVSGesture(part, train=train))


class CIFAR10DVS(_Events):
    """CIFAR10-DVS (Li et al. 2017): CIFAR-10 images moved in front of a camera, 128 × 128 pixels.

    `root/CIFAR10DVS/CLASS/cifar10_CLASS_N.aedat` or `.aedat4`. There is no official split: as in the SLTT paper, per
    class files 0 to 899 by number train, and 900 to 999 test.
    """

    sensor = (128, 128)
    classes = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
    title = "CIFAR10-DVS"
    expected = (9_000, 1_000)

    def layout(self) -> str:
        return "CIFAR10DVS/CLASS/cifar10_CLASS_N.aedat or .aedat4 there"

    def recordings(self, train: bool) -> Recordings:
        found: Recordings = []
        for label, name in enumerate(self.classes):
            files = [p for p in (self.root / "CIFAR10DVS" / name).glob("*.aedat*") if _number(p) is not None]
            files.sort(key=lambda p: _number(p) or 0)
            found += [(path, label) for path in files if ((_number(path) or 0) < 900) == train]
        return found

    def fetch(self) -> None:
        from tonic import datasets

        download(self.root, "CIFAR10DVS", datasets.CIFAR10DVS)


class EventFolder(_Events):
    """Any folder of recordings, `root/{train,test}/CLASS/*`, in a format that `sltt.data.recordings` reads.

    Args:
        root: folder of the data.
        sensor: height and width of the camera in pixels.
        kwargs: as for the other data sets of recordings; there is nothing to download.
    """

    title = "the folder of recordings"

    def __init__(self, root: str, sensor: tuple[int, int], **kwargs: Any):
        super().__init__(root, **kwargs)
        sides = whole_numbers("sensor", sensor, least=1)
        if len(sides) != 2:
            raise ValueError(f"sensor must be the height and the width of the camera, got {sensor}")
        self.sensor = (sides[0], sides[1])
        self.classes = sorted(p.name for p in (self.root / "train").glob("*") if p.is_dir())
        self.expected = (0, 0)

    def layout(self) -> str:
        return "train/CLASS/* and test/CLASS/* there"

    def recordings(self, train: bool) -> Recordings:
        found: Recordings = []
        home = self.root / ("train" if train else "test")
        for label, name in enumerate(self.classes):
            files = sorted(p for p in (home / name).glob("*") if p.is_file() and not p.name.startswith("."))
            if train and not files:
                raise FileNotFoundError(f"the class folder {home / name} has no recordings: add some, or remove it")
            found += [(path, label) for path in files]
        if unknown := sorted({p.name for p in home.glob("*") if p.is_dir()} - set(self.classes)):
            raise ValueError(
                f"{home} has classes that train has not: {', '.join(unknown[:5])}; remove them, or add both"
            )
        return found


def _number(path: Path) -> int | None:
    """N of cifar10_CLASS_N.aedat."""
    digits = path.stem.rpartition("_")[2]
    return int(digits) if digits.isdigit() else None


def download(root: Path, name: str, fetch: Callable[[str], Any]) -> None:
    """Let tonic download a data set beside `root/name`, and move it there when it is whole."""
    if importlib.util.find_spec("tonic") is None:
        raise ImportError("downloading event data needs tonic: pip install 'sltt[events]'")
    part = root / f".{name}.part"
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        fetch(str(part))
        for entry in (part / name).iterdir():
            target = root / name / entry.name
            if not target.exists():
                target.parent.mkdir(parents=True, exist_ok=True)
                entry.rename(target)
    finally:
        shutil.rmtree(part, ignore_errors=True)
