"""Data sets with fixed, seeded splits: each yields samples of static images [C, H, W] or sequences [T, C, H, W]."""

from sltt.data.augment import EventAugmentation
from sltt.data.base import Data, Splits
from sltt.data.classes import Classes
from sltt.data.digits import Digits, DigitsEvents
from sltt.data.encodings import Delta, Encoded, Encoding, Latency, Poisson
from sltt.data.events import CIFAR10DVS, NMNIST, DVSGesture, EventFolder
from sltt.data.images import CIFAR10, CIFAR100, Cutout, ImageFolder, Mixup
from sltt.data.own import from_datasets
from sltt.data.recall import Recall
from sltt.data.sequential import SequentialDigits, SequentialMNIST
from sltt.data.series import TimeSeries
from sltt.data.shd import SHD

__all__ = [
    "CIFAR10",
    "CIFAR10DVS",
    "CIFAR100",
    "NMNIST",
    "SHD",
    "Classes",
    "Cutout",
    "DVSGesture",
    "Data",
    "Delta",
    "Digits",
    "DigitsEvents",
    "Encoded",
    "Encoding",
    "EventAugmentation",
    "EventFolder",
    "ImageFolder",
    "Latency",
    "Mixup",
    "Poisson",
    "Recall",
    "SequentialDigits",
    "SequentialMNIST",
    "Splits",
    "TimeSeries",
    "from_datasets",
]
