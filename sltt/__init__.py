"""Train spiking neural networks at a memory cost that does not grow with the number of time steps."""

import ast
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # the public names, imported when one is first used: `sltt --help` starts without PyTorch
    from sltt import analysis as analysis
    from sltt import callbacks as callbacks
    from sltt import data as data
    from sltt import interop as interop
    from sltt import losses as losses
    from sltt import metrics as metrics
    from sltt import models as models
    from sltt import schedules as schedules
    from sltt import surrogates as surrogates
    from sltt.dropout import Dropout as Dropout
    from sltt.neurons import ALIF as ALIF
    from sltt.neurons import IF as IF
    from sltt.neurons import LIF as LIF
    from sltt.neurons import PLIF as PLIF
    from sltt.neurons import ChannelLIF as ChannelLIF
    from sltt.neurons import CubaLIF as CubaLIF
    from sltt.neurons import IntegerLIF as IntegerLIF
    from sltt.neurons import Neuron as Neuron
    from sltt.neurons import OnlineRenorm as OnlineRenorm
    from sltt.neurons import Recurrent as Recurrent
    from sltt.neurons import StableLIF as StableLIF
    from sltt.neurons import TernaryLIF as TernaryLIF
    from sltt.neurons import lif_step as lif_step
    from sltt.parallel import devices as devices
    from sltt.pooling import RunningMax as RunningMax
    from sltt.rules import BPTT as BPTT
    from sltt.rules import OTTT as OTTT
    from sltt.rules import SLTT as SLTT
    from sltt.rules import TBPTT as TBPTT
    from sltt.rules import Mixed as Mixed
    from sltt.rules import Output as Output
    from sltt.rules import RateBased as RateBased
    from sltt.rules import Rule as Rule
    from sltt.rules import unroll as unroll
    from sltt.sequence.once import once as once
    from sltt.sequence.padding import Padded as Padded
    from sltt.sequence.pairs import normalise_and_fire as normalise_and_fire
    from sltt.sequence.state import Stateful as Stateful
    from sltt.sequence.state import detach as detach
    from sltt.sequence.state import register as register
    from sltt.sequence.state import reset as reset
    from sltt.sequence.step import Step as Step
    from sltt.training.check import check as check
    from sltt.training.evaluation import evaluate as evaluate
    from sltt.training.fit import fit as fit
    from sltt.training.graphs import graphed as graphed
    from sltt.training.phases import Phase as Phase
    from sltt.training.trained import load as load
    from sltt.training.trained import predict as predict
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
            globals()[name] = value = getattr(import_module(_HOMES[name]), name)
            return value
        if name.isidentifier() and find_spec(f"sltt.{name}"):  # sltt.data and other modules
            return import_module(f"sltt.{name}")
        raise AttributeError(f"module 'sltt' has no attribute {name!r}")

    def __dir__() -> set[str]:
        return {*globals(), *__all__}


__version__ = version("sltt")
