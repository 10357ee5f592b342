"""Train spiking neural networks at a memory cost that does not grow with the number of time steps."""

from importlib.metadata import version

from sltt import analysis, callbacks, data, interop, losses, metrics, models, schedules, surrogates
from sltt.dropout import Dropout
from sltt.neurons import (
    ALIF,
    IF,
    LIF,
    PLIF,
    ChannelLIF,
    CubaLIF,
    IntegerLIF,
    Neuron,
    OnlineRenorm,
    Recurrent,
    StableLIF,
    TernaryLIF,
    lif_step,
)
from sltt.parallel import devices
from sltt.pooling import RunningMax
from sltt.rules import BPTT, OTTT, SLTT, TBPTT, Mixed, Output, RateBased, Rule, unroll
from sltt.sequence.once import once
from sltt.sequence.padding import Padded
from sltt.sequence.state import Stateful, detach, register, reset
from sltt.training.evaluation import evaluate
from sltt.training.fit import fit
from sltt.training.phases import Phase
from sltt.training.trained import load, predict

__version__ = version("sltt")

__all__ = [
    "ALIF",
    "BPTT",
    "IF",
    "LIF",
    "OTTT",
    "PLIF",
    "SLTT",
    "TBPTT",
    "ChannelLIF",
    "CubaLIF",
    "Dropout",
    "IntegerLIF",
    "Mixed",
    "Neuron",
    "OnlineRenorm",
    "Output",
    "Padded",
    "Phase",
    "RateBased",
    "Recurrent",
    "Rule",
    "RunningMax",
    "StableLIF",
    "Stateful",
    "TernaryLIF",
    "analysis",
    "callbacks",
    "data",
    "detach",
    "devices",
    "evaluate",
    "fit",
    "interop",
    "lif_step",
    "load",
    "losses",
    "metrics",
    "models",
    "once",
    "predict",
    "register",
    "reset",
    "schedules",
    "surrogates",
    "unroll",
]
