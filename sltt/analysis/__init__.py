"""Measurements of a network and a rule: memory and firing rates."""

from sltt.analysis.firing import FiringRates
from sltt.analysis.memory import available_memory, parse_bytes, peak_memory, process_peak, reset_process_peak

__all__ = ["FiringRates", "available_memory", "parse_bytes", "peak_memory", "process_peak", "reset_process_peak"]
