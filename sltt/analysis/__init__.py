"""Measurements of a network and a rule: memory, time, operations, energy, firing rates, agreement with exact BPTT."""

from sltt.analysis.advice import Trial, advice
from sltt.analysis.agreement import Agreement, Proposal, agreement, propose
from sltt.analysis.budget import PeakModel, fit_peak
from sltt.analysis.energy import Energy, LayerOperations, measure_energy, neurobench, synaptic_operations
from sltt.analysis.firing import FiringRates, firing_rates
from sltt.analysis.iteration import Memory, Seconds, iteration_seconds, memory_parts
from sltt.analysis.operations import Operations, count_operations
from sltt.analysis.paths import LayerPath, layer_paths
from sltt.analysis.rates import RateTest, find_learning_rate
from sltt.memory import peak_memory

__all__ = [
    "Agreement",
    "Energy",
    "FiringRates",
    "LayerOperations",
    "LayerPath",
    "Memory",
    "Operations",
    "PeakModel",
    "Proposal",
    "RateTest",
    "Seconds",
    "Trial",
    "advice",
    "agreement",
    "count_operations",
    "find_learning_rate",
    "firing_rates",
    "fit_peak",
    "iteration_seconds",
    "layer_paths",
    "measure_energy",
    "memory_parts",
    "neurobench",
    "peak_memory",
    "propose",
    "synaptic_operations",
]
