"""Spiking neurons: a pure step function each, and thin modules that keep the states."""

from sltt.neurons.adaptive import ALIF, ChannelLIF
from sltt.neurons.base import Neuron
from sltt.neurons.graded import IntegerLIF, TernaryLIF
from sltt.neurons.leaky import IF, LIF, PLIF, IntegrateAndFire, lif_step
from sltt.neurons.recurrent import Recurrent
from sltt.neurons.stabilised import OnlineRenorm, StableLIF
from sltt.neurons.synaptic import CubaLIF

__all__ = [
    "ALIF",
    "IF",
    "LIF",
    "PLIF",
    "ChannelLIF",
    "CubaLIF",
    "IntegerLIF",
    "IntegrateAndFire",
    "Neuron",
    "OnlineRenorm",
    "Recurrent",
    "StableLIF",
    "TernaryLIF",
    "lif_step",
]
