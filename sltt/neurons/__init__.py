"""Spiking neurons: a pure step function each, and thin modules that keep the states."""

from sltt.neurons.adaptive import ALIF as ALIF, ChannelLIF as ChannelLIF
from sltt.neurons.base import Neuron as Neuron
from sltt.neurons.delay import Delay as Delay
from sltt.neurons.graded import IntegerLIF as IntegerLIF, TernaryLIF as TernaryLIF
from sltt.neurons.leaky import IF as IF, LI as LI, LIF as LIF, PLIF as PLIF, IntegrateAndFire as IntegrateAndFire
from sltt.neurons.leaky import lif_step as lif_step
from sltt.neurons.recurrent import Recurrent as Recurrent
from sltt.neurons.synaptic import CubaLIF as CubaLIF
