"""Data sets with fixed, seeded splits: each yields samples of static images [C, H, W] or sequences [T, C, H, W]."""

from sltt.data.base import Data, Splits
from sltt.data.digits import Digits, DigitsEvents
from sltt.data.images import CIFAR10, CIFAR100, ImageFolder

__all__ = ["CIFAR10", "CIFAR100", "Data", "Digits", "DigitsEvents", "ImageFolder", "Splits"]
