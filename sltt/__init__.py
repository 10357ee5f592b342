"""Train spiking neural networks at a memory cost that does not grow with the number of time steps."""

from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from pkgutil import resolve_name
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
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
    from sltt.sequence.step import Step
    from sltt.training.check import check
    from sltt.training.evaluation import evaluate
    from sltt.training.fit import fit
    from sltt.training.graphs import graphed
    from sltt.training.phases import Phase
    from sltt.training.trained import load, predict
else:
    # the imports above, made when a name is first used: `sltt --help` starts without PyTorch
    _HOMES = {
        "dropout": ["Dropout"],
        "neurons": [
            "ALIF", "IF", "LIF", "PLIF", "ChannelLIF", "CubaLIF", "IntegerLIF", "Neuron", "OnlineRenorm", "Recurrent",
            "StableLIF", "TernaryLIF", "lif_step",
        ],
        "parallel": ["devices"],
        "pooling": ["RunningMax"],
        "rules": ["BPTT", "OTTT", "SLTT", "TBPTT", "Mixed", "Output", "RateBased", "Rule", "unroll"],
        "sequence.once": ["once"],
        "sequence.padding": ["Padded"],
        "sequence.state": ["Stateful", "detach", "register", "reset"],
        "sequence.step": ["Step"],
        "training.check": ["check"],
        "training.evaluation": ["evaluate"],
        "training.fit": ["fit"],
        "training.graphs": ["graphed"],
        "training.phases": ["Phase"],
        "training.trained": ["load", "predict"],
    }  # fmt: skip

    def __getattr__(name: str) -> Any:
        for home, names in _HOMES.items():
            if name in names:
                globals()[name] = value = resolve_name(f"sltt.{home}.{name}")
                return value
        if name.isidentifier() and find_spec(f"sltt.{name}"):  # sltt.data and other modules
            return import_module(f"sltt.{name}")
        raise AttributeError(f"module 'sltt' has no attribute {name!r}")

    def __dir__() -> set[str]:
        return {*globals(), *__all__}


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
    "Step",
    "TernaryLIF",
    "analysis",
    "callbacks",
    "check",
    "data",
    "detach",
    "devices",
    "evaluate",
    "fit",
    "graphed",
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
