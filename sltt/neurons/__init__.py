"""Spiking neurons: a pure step function each, and thin modules that keep the states."""

from sltt.neurons.base import Neuron
from sltt.neurons.leaky import IF, LIF, PLIF, IntegrateAndFire, lif_step

__all__ = ["IF", "LIF", "PLIF", "IntegrateAndFire", "Neuron", "lif_step"]
