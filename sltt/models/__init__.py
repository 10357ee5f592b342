"""Networks of the paper, and small ones for CPUs: each call is one time step, [B, C, H, W] to [B, classes]."""

from sltt.models.digitsnet import DigitsNet
from sltt.models.mlp import MLP
from sltt.models.nfresnet import NFResNet, nfresnet34, nfresnet50, nfresnet101
from sltt.models.resnet import ResNet, resnet18, resnet34
from sltt.models.shallow import ShallowResNet, ShallowVGG
from sltt.models.transformers import SpikingTransformer, qkformer, spikformer
from sltt.models.vgg import VGG, vgg11, vgg13, vgg16, vgg19

__all__ = [
    "MLP",
    "VGG",
    "DigitsNet",
    "NFResNet",
    "ResNet",
    "ShallowResNet",
    "ShallowVGG",
    "SpikingTransformer",
    "nfresnet34",
    "nfresnet50",
    "nfresnet101",
    "qkformer",
    "resnet18",
    "resnet34",
    "spikformer",
    "vgg11",
    "vgg13",
    "vgg16",
    "vgg19",
]
