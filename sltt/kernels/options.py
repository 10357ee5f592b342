"""Options of the kernels: compilation, sparse layers, spikes saved as bits, memory of time steps in a call."""

import functools
import importlib.util
import os
import shutil
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, replace
from types import FunctionType
from typing import Any, Literal, get_args

import torch

from sltt._torch import _len_torch_function_stack, _pop_mode, _push_mode, compile_errors
from sltt.checks import choice, flag, whole_number

Compile = Literal["auto", "on", "off"]
Sparse = Literal["auto", "on", "off"]

# A layer from which compiling pays: below, the few seconds that it takes are more than it saves in a short training.
COMPILE_FROM = 2**20


@dataclass(frozen=True)
class Options:
    """Options of the kernels, see `using`."""

    compile: Compile = "auto"
    bits: bool = True
    sparse: Sparse = "auto"
    fold_memory: int | None = None

    def __post_init__(self) -> None:
        choice("compile", self.compile, get_args(Compile))
        flag("bits", self.bits)
        choice("sparse", self.sparse, get_args(Sparse))
        if self.fold_memory is not None:
            whole_number("fold_memory", self.fold_memory, least=0)


DEFAULT = Options()
_options = ContextVar("options", default=DEFAULT)  # each thread has its own
_chosen: ContextVar[dict[Any, bool] | None] = ContextVar("chosen", default=None)  # whether kernels run compiled
_NOTHING = nullcontext()


options = _options.get  # gives the options in force in this thread


@contextmanager
def using(**changes: Any) -> Iterator[None]:
    """Change how kernels run inside a `with` block, in the thread that runs it.

    Args:
        changes: `compile`: compile kernels where it pays ("auto"), always ("on") or never ("off"). `bits`: save spikes
            as one bit each (True or False). `sparse`: compute on active inputs only, where it is faster ("auto"),
            wherever possible ("on") or never ("off"); it needs bits, and images with the channels last in memory.
            `fold_memory`: bytes that the further time steps of a call may take where a rule chooses their number; None
            is the larger of 16 MB and of weights and gradients; on a GPU, an eighth of its memory.

    Raises ValueError for an unknown value. With compile="on", a kernel on a device without a compiler raises it.
    """
    with in_force(replace(options(), **changes)):
        yield


@contextmanager
def in_force(wanted: Options) -> Iterator[None]:
    """Keep these options inside this block: in a backward, which runs in threads of its own, those of the forward."""
    token = _options.set(wanted)
    try:
        yield
    finally:
        _options.reset(token)


@contextmanager
def choosing_once() -> Iterator[None]:
    """Run a kernel compiled, or not, inside this block as at its first call with so many elements.

    Rounding of the two may differ, and a larger layer compiles the kernel for all.
    """
    token = _chosen.set({})
    try:
        yield
    finally:
        _chosen.reset(token)


@functools.cache
def compiler_problem(device: torch.device) -> str | None:
    """Return why no kernel can be compiled for a device, in one line; None if it can."""
    if device.type not in ("cpu", "cuda"):
        return f"kernels are compiled for cpu and cuda, not for {device.type}"
    if device.type == "cuda":
        return None if importlib.util.find_spec("triton") else "Triton is not installed: pip install 'sltt[gpu]'"
    names = (os.environ.get("CXX"), "g++", "clang++")
    return None if any(name and shutil.which(name) for name in names) else "there is no C++ compiler (apt install g++)"


class Kernel:
    """A function that writes its first argument: compiled for any length once a long one comes, run as it is till then.

    It is called with dense tensors of any memory format, and sees each as its memory, [n].
    """

    def __init__(self, function: Callable[..., None]):
        self.function = function
        self._compiled: dict[Any, Callable[..., None]] = {}
        self._failed = False

    def __call__(self, out: torch.Tensor, *arguments: Any) -> None:
        """Run on `arguments`, writing `out`; if compiling fails and is not demanded, warn and run the plain form."""
        with torch.no_grad(), without_modes():
            out = self.to_argument(out)
            arguments = tuple(self.to_argument(a) if isinstance(a, torch.Tensor) else a for a in arguments)
            if not self._compiles(out.device, max(a.numel() for a in (out, *arguments) if isinstance(a, torch.Tensor))):
                self.function(out, *arguments)
                return
            # for each set of types, since the compiler gives up on a function after eight versions of it
            types = tuple(a.dtype if isinstance(a, torch.Tensor) else type(a) for a in (out, *arguments))
            if types not in self._compiled:
                # with code of its own: the compiler counts its versions by the code, which closures share
                of = self.source((out, *arguments))
                code = of.__code__.replace()
                function = FunctionType(code, of.__globals__, of.__name__, of.__defaults__, of.__closure__)
                # the vectors are a part of the key of TorchInductor's cache, and the instruction set is not: a process
                # limited by ATEN_CPU_CAPABILITY would take code that was made for other vectors
                width: Any = {"cpp.simdlen": {"AVX512": 512, "AVX2": 256}.get(torch.backends.cpu.get_cpu_capability())}
                self._compiled[types] = torch.compile(function, dynamic=True, fullgraph=True, options=width)
            try:
                self._compiled[types](out, *arguments)
            except compile_errors() as error:  # raised before anything has run: the plain form is right without it
                if options().compile == "on":
                    raise
                self._failed = True
                warnings.warn(f"compiling a kernel failed, running it eagerly: {error}", stacklevel=3)
                self.function(out, *arguments)

    def to_argument(self, a: torch.Tensor) -> torch.Tensor:
        """Return an argument as the function sees it."""
        # a number stays a number of no dimension: as a vector it would decide the type of the result
        return memory(a) if a.ndim else a.detach()

    def source(self, arguments: Sequence[Any]) -> Callable[..., None]:
        """Return what to compile in place of the function, which it equals."""
        return self.function

    def _compiles(self, device: torch.device, elements: int) -> bool:
        mode = options().compile
        if mode == "off" or elements < 2:
            return False
        if mode == "on":
            if problem := compiler_problem(device):
                raise ValueError(f"compile='on', but {problem}; use 'auto'")
            return True
        from_ = COMPILE_FROM // 16 if self._compiled else COMPILE_FROM
        pays = elements >= from_ and compiler_problem(device) is None
        if (chosen := _chosen.get()) is not None:
            pays = chosen.setdefault((self, elements), pays)
        return pays and not self._failed


def memory(x: torch.Tensor) -> torch.Tensor:
    """Return a dense tensor's memory [n]; not as a view, for which the compiler would compile anew."""
    x = x.resolve_neg()  # a negated view has the memory of what it negates
    return x.new_empty(0).set_(x.untyped_storage(), x.storage_offset(), (x.numel(),), (1,))


def dense(x: torch.Tensor) -> bool:
    """Return whether x's elements fill a stretch of memory without gaps or overlaps, in any order."""
    return x.is_contiguous() or bool(torch.ops.aten.is_non_overlapping_and_dense(x))


def known_layout(x: torch.Tensor, channels: bool) -> bool:
    """Return whether kernels take x's memory as it is: dense, and with `channels`, these in order or last."""
    return x.is_contiguous() or (dense(x) if not channels else x.movedim(1, -1).is_contiguous())


def match_format(x: Any, other: torch.Tensor) -> Any:
    """Return a tensor in the memory format of another; None for None."""
    if x is None:
        return None
    x = x.resolve_neg()
    return x if x.stride() == other.stride() else torch.empty_like(other, dtype=x.dtype).copy_(x)


class _WithoutModes:
    def __enter__(self) -> None:
        self._modes = []
        while _len_torch_function_stack():
            self._modes.append(_pop_mode())

    def __exit__(self, *error: object) -> None:
        for mode in reversed(self._modes):
            _push_mode(mode)


def without_modes() -> AbstractContextManager[None]:
    """Set function modes aside: they are for the user's operations, and a kernel would be compiled anew under each."""
    return _WithoutModes() if _len_torch_function_stack() else _NOTHING
