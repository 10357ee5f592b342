"""Data sets with fixed, seeded splits: each yields samples of static images [C, H, W] or sequences [T, C, H, W]."""

from sltt.data.augment import EventAugmentation as EventAugmentation
from sltt.data.base import Data as Data, Splits as Splits
from sltt.data.classes import Classes as Classes
from sltt.data.digits import Digits as Digits, DigitsEvents as DigitsEvents
from sltt.data.encodings import Delta as Delta, Encoded as Encoded, Encoding as Encoding, Latency as Latency
from sltt.data.encodings import Poisson as Poisson
from sltt.data.events import CIFAR10DVS as CIFAR10DVS, NMNIST as NMNIST, DVSGesture as DVSGesture
from sltt.data.events import EventFolder as EventFolder
from sltt.data.images import CIFAR10 as CIFAR10, CIFAR100 as CIFAR100, ImageFolder as ImageFolder, Mixup as Mixup
from sltt.data.own import from_datasets as from_datasets
from sltt.data.recall import Recall as Recall
from sltt.data.sequential import SequentialDigits as SequentialDigits
from sltt.data.series import TimeSeries as TimeSeries
from sltt.data.shd import SHD as SHD
from sltt.data.speech import SpokenDigits as SpokenDigits
