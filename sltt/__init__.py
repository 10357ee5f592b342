"""Train spiking neural networks at a memory cost that does not grow with the number of time steps."""

import ast
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from pkgutil import resolve_name
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # the public names, imported when one is first used: `sltt --help` starts without PyTorch
    from sltt import analysis as analysis, callbacks as callbacks, data as data, interop as interop, losses as losses
    from sltt import metrics as metrics, models as models, schedules as schedules, surrogates as surrogates
    from sltt.neurons import ALIF as ALIF, IF as IF, LI as LI, LIF as LIF, PLIF as PLIF, ChannelLIF as ChannelLIF
    from sltt.neurons import CubaLIF as CubaLIF, Delay as Delay, IntegerLIF as IntegerLIF, Neuron as Neuron
    from sltt.neurons import Recurrent as Recurrent, TernaryLIF as TernaryLIF, lif_step as lif_step
    from sltt.neurons.dropout import Dropout as Dropout
    from sltt.parallel import devices as devices
    from sltt.neurons.pooling import RunningMax as RunningMax
    from sltt.rules import BPTT as BPTT, OTTT as OTTT, SLTT as SLTT, TBPTT as TBPTT, Mixed as Mixed, Output as Output
    from sltt.rules import RateBased as RateBased, Rule as Rule, unroll as unroll
    from sltt.rules.stream import Stream as Stream
    from sltt.sequence.once import once as once
    from sltt.sequence.padding import Padded as Padded
    from sltt.sequence.pairs import normalise_and_fire as normalise_and_fire
    from sltt.sequence.state import Stateful as Stateful, detach as detach, register as register, reset as reset
    from sltt.sequence.step import Step as Step
    from sltt.training.check import check as check
    from sltt.training.evaluation import evaluate as evaluate
    from sltt.training.fit import fit as fit
    from sltt.training.graphs import graphed as graphed
    from sltt.training.phases import Phase as Phase
    from sltt.training.trained import load as load, predict as predict
else:
    _HOMES = {
        alias.name: line.module
        for block in ast.parse(Path(__file__).read_text(encoding="utf-8")).body
        if isinstance(block, ast.If)
        for line in block.body
        for alias in line.names
    }
    __all__ = sorted(_HOMES)

    def __getattr__(name: str) -> Any:
        if _HOMES.get(name, "sltt") != "sltt":
            globals()[name] = value = resolve_name(f"{_HOMES[name]}.{name}")
            return value
        if name.isidentifier() and find_spec(f"sltt.{name}"):  # sltt.data and other modules
            return import_module(f"sltt.{name}")
        raise AttributeError(f"module 'sltt' has no attribute {name!r}")

    def __dir__() -> set[str]:
        return {*globals(), *__all__}


__version__ = version("sltt")
