"""Names of PyTorch and Lightning that are not public, as read in PyTorch 2.8, 2.13 and 2.15 and Fabric 2.5 and 2.6.

No other file imports any. Other files use some attributes of objects where they need them.
"""

# ruff: noqa: F401
import gc
import random
import sys
import threading
from abc import ABC
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib import import_module
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch.autograd import forward_ad
from torch.nn.utils import parametrize

try:
    from torch._C import (  # pyright: ignore
        _are_functorch_transforms_active,
        _current_graph_task_id,
        _len_torch_function_stack,
    )
    from torch._C._autograd import _top_saved_tensors_default_hooks  # pyright: ignore
    from torch._C._functorch import is_functorch_wrapped_tensor  # pyright: ignore
    from torch.multiprocessing.reductions import StorageWeakRef
    from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
    from torch.nn.modules.dropout import _DropoutNd
    from torch.nn.modules.instancenorm import _InstanceNorm
    from torch.nn.utils.parametrizations import _SpectralNorm
    from torch.overrides import _get_current_function_mode_stack, _pop_mode, _push_mode
    from torch.utils._device import DeviceContext
    from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
    from torch.utils._pytree import tree_leaves, tree_map_only
except ImportError as error:
    raise ImportError(f"PyTorch {torch.__version__} lacks what PyTorch 2.8 to 2.15 have: {error}") from error


class DispatchMode(TorchDispatchMode):
    """A dispatch mode that does not import PyTorch's compiler, which takes seconds, at the first operation."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False


FABRIC = "_forward_module."  # what Fabric puts before the names of modules and parameters
WRAPPERS = FABRIC, "_orig_mod.", "module."  # and what torch.compile and DistributedDataParallel do
_switching_collector = threading.Lock()


def get_rng_states(devices: Iterable[torch.device] = ()) -> dict[torch.device, torch.Tensor]:
    """Return the states of the global random generators of the CPU and of those devices that are GPUs of CUDA.

    No garbage is collected meanwhile. PyTorch holds a generator's lock while it makes the tensor of its state, and
    garbage gives up the GIL: another thread that holds it and waits for the lock would wait for ever.
    """
    with _switching_collector:
        collects = gc.isenabled()
        gc.disable()
        try:
            states = {torch.device("cpu"): torch.get_rng_state()}
            return states | {device: torch.cuda.get_rng_state(device) for device in devices if device.type == "cuda"}
        finally:
            if collects:
                gc.enable()


def set_rng_states(states: dict[torch.device, torch.Tensor]) -> None:
    """Set the global random generators to such states."""
    for device, state in states.items():
        module: Any = torch.cuda if device.type == "cuda" else torch
        module.set_rng_state(*((state, device) if device.type == "cuda" else (state,)))


@contextmanager
def keep_generators(*devices: torch.device) -> Iterator[None]:
    """Leave the global random generators as they were: Python's, NumPy's, PyTorch's of the CPU and of these devices."""
    states = get_generators(devices)
    try:
        yield
    finally:
        set_generators(states)


def get_generators(devices: Iterable[torch.device] = ()) -> tuple[Any, ...]:
    """Return the states of the global random generators of Python, NumPy and PyTorch."""
    return random.getstate(), np.random.get_state(), get_rng_states(devices)


def set_generators(states: tuple[Any, ...]) -> None:
    """Set the global random generators to such states."""
    random.setstate(states[0])
    np.random.set_state(states[1])
    set_rng_states(states[2])


@contextmanager
def without_compiler(factory: Any = torch.optim.Optimizer) -> Iterator[None]:
    """Keep PyTorch's compiler out of this block, unless it is in the process: its import takes seconds.

    PyTorch's optimizers import it to tell it what not to trace, and Fabric for a class. They get a stand-in, and what
    asks for more gets the compiler. A `factory` that is no class of PyTorch's, or partial of one, may do anything.
    """
    parts = getattr(factory, "func", factory), *getattr(factory, "args", ())
    known = all(getattr(part, "__module__", "").startswith(("torch.optim.", "jsonargparse.")) for part in parts)
    if not known or "torch._dynamo" in sys.modules:
        yield
        return
    stand_in: Any = ModuleType("torch._dynamo")
    disabled: list[Any] = []

    def end() -> None:
        if sys.modules.get("torch._dynamo") is stand_in:
            del sys.modules["torch._dynamo"]
        while disabled:
            vars(disabled.pop()).pop("__dynamo_disable", None)  # which PyTorch keeps on the function

    def imported(name: str) -> Any:
        if name == "__path__":  # asked for by `from torch._dynamo import`
            raise AttributeError(name)
        end()
        return getattr(import_module("torch._dynamo"), name)

    stand_in.disable = lambda function, *_, **__: (disabled.append(function), function)[1]
    stand_in.graph_break, stand_in.OptimizedModule, stand_in.__getattr__ = (lambda: None), CompiledModule, imported
    sys.modules["torch._dynamo"] = stand_in
    try:
        yield
    finally:
        end()


class CompiledModule(ABC):  # noqa: B024
    """Stands for the class of what `torch.compile` makes of a network."""

    @classmethod
    def __subclasshook__(cls, kind: type) -> bool:
        return "OptimizedModule" in (base.__name__ for base in kind.__mro__)


def compile_errors() -> tuple[type[Exception], ...]:
    """Return the errors that `torch.compile` raises while it compiles, before anything has run."""
    from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException  # take a second to import
    from torch._inductor.exc import CppCompileError, InvalidCxxCompiler

    return TorchDynamoException, FailOnRecompileLimitHit, CppCompileError, InvalidCxxCompiler


@contextmanager
def uncached_weights() -> Iterator[None]:
    """Have parametrised weights made at each use: in `parametrize.cached`, one made without a graph would stay."""
    depth, parametrize._cache_enabled = parametrize._cache_enabled, 0
    try:
        yield
    finally:
        parametrize._cache_enabled += depth


def is_compiled(module: torch.nn.Module) -> bool:
    """Return whether a call of a module runs compiled code: of it, of its forward, or by `module.compile()`."""
    forward = module.forward
    if getattr(module, "_compiled_call_impl", None) is not None or hasattr(forward, "_torchdynamo_orig_callable"):
        return True
    return hasattr(module, "_orig_mod") or hasattr(forward, "_orig_mod")


def transforms_active() -> bool:
    """Return whether a transform of `torch.func`, or forward-mode differentiation, is at work."""
    return _are_functorch_transforms_active() or forward_ad._current_level >= 0


def wrapped_module(module: torch.nn.Module) -> torch.nn.Module | None:
    """Return the network in what Fabric and DistributedDataParallel put around it; None of another module."""
    wrapper = type(module).__module__.startswith(("lightning_fabric.wrappers", "torch.nn.parallel.distributed"))
    return next(module.children()) if wrapper else None


def unwrapped(model: torch.nn.Module) -> torch.nn.Module:
    """Return the network in what Fabric and DistributedDataParallel put around it."""
    while (inner := wrapped_module(model)) is not None:
        model = inner
    return model


def has_own_operations() -> bool:
    """Return whether a function mode of the user's is in force, which gives operations another meaning."""
    if not _len_torch_function_stack():
        return False
    modes = (type(mode) for mode in _get_current_function_mode_stack())
    return any(kind is not DeviceContext and not kind.__module__.startswith("sltt.") for kind in modes)


def has_global_hooks() -> bool:
    """Return whether a hook for all modules is in force."""
    of = torch.nn.modules.module
    hooks = of._global_forward_hooks, of._global_forward_pre_hooks
    return any(hooks) or bool(of._global_backward_hooks) or bool(of._global_backward_pre_hooks)


# on a GPU one launch each
_foreach_mul, _foreach_norm, _foreach_zero_ = torch._foreach_mul, torch._foreach_norm, torch._foreach_zero_  # pyright: ignore


def add_to_each(tensors: list[Any], values: list[Any]) -> None:
    """Add to each tensor its value, a number or a tensor; on a GPU in one launch."""
    torch._foreach_add_(tensors, values)  # pyright: ignore[reportPrivateImportUsage]


def end_workers(loader: torch.utils.data.DataLoader) -> None:
    """End the processes that load a loader's data."""
    iterator, loader._iterator = loader._iterator, None
    if hasattr(iterator, "_shutdown_workers"):
        iterator._shutdown_workers()  # type: ignore[union-attr]  # pyright: ignore
