"""Networks of the paper, and small ones for CPUs: each call is one time step, [B, C, H, W] to [B, classes]."""

from sltt.models.digitsnet import DigitsNet as DigitsNet
from sltt.models.mlp import MLP as MLP
from sltt.models.nfresnet import NFResNet as NFResNet, nfresnet34 as nfresnet34, nfresnet50 as nfresnet50
from sltt.models.nfresnet import nfresnet101 as nfresnet101
from sltt.models.resnet import ResNet as ResNet, resnet18 as resnet18, resnet34 as resnet34
from sltt.models.shallow import ShallowResNet as ShallowResNet, ShallowVGG as ShallowVGG
from sltt.models.shipped import pretrained as pretrained
from sltt.models.transformers import SpikingTransformer as SpikingTransformer, qkformer as qkformer
from sltt.models.transformers import spikformer as spikformer
from sltt.models.vgg import VGG as VGG, vgg11 as vgg11
