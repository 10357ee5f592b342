"""Measurements of a network and a rule: memory, multiplications, firing rates, and agreement with exact BPTT."""

from sltt.analysis.agreement import Agreement, advice, agreement
from sltt.analysis.firing import FiringRates
from sltt.analysis.memory import available_memory, parse_bytes, peak_memory, process_peak, reset_process_peak
from sltt.analysis.operations import Operations, count_operations

__all__ = [
    "Agreement",
    "FiringRates",
    "Operations",
    "advice",
    "agreement",
    "available_memory",
    "count_operations",
    "parse_bytes",
    "peak_memory",
    "process_peak",
    "reset_process_peak",
]
