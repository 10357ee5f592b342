"""Measurements of a network and a rule: memory, time, operations, energy, firing rates, agreement with exact BPTT."""

from sltt.analysis.advice import Trial as Trial, advice as advice
from sltt.analysis.agreement import Agreement as Agreement, agreement as agreement
from sltt.analysis.budget import PeakModel as PeakModel, fit_peak as fit_peak
from sltt.analysis.energy import Energy as Energy, LayerOperations as LayerOperations, measure_energy as measure_energy
from sltt.analysis.energy import neurobench as neurobench
from sltt.analysis.firing import FiringRates as FiringRates, firing_rates as firing_rates
from sltt.analysis.iteration import Memory as Memory, Seconds as Seconds, iteration_seconds as iteration_seconds
from sltt.analysis.iteration import memory_parts as memory_parts
from sltt.analysis.operations import Operations as Operations, count_operations as count_operations
from sltt.analysis.paths import LayerPath as LayerPath, layer_paths as layer_paths
from sltt.memory import peak_memory as peak_memory
