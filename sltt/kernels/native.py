"""The C++ kernels: those of the wheel; else compiled on the user's machine at first use, and kept in a cache.

With the environment variable CXX, that compiler compiles them for this processor, also where the wheel has some.

The cache is `$XDG_CACHE_HOME/sltt`, by default `~/.cache/sltt`. The name of a library is a digest of what it was
compiled from and for: source, compiler, flags, processor, and the instruction set that PyTorch is limited to. A damaged
file is found and replaced. Without a library layers run dense; `problem` says why.
"""

import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch

from sltt.kernels.compiling import FLAGS, SHIPPED, compile_library, is_intact, shipped_name, sources
from sltt.kernels.options import COMPILE_FROM, options
from sltt.system import is_own, is_private, read_processor

_PROCESSORS = {"x86_64": "-march=native", "aarch64": "-mcpu=native"}
# the features of a processor that the libraries of a wheel need
_X86_64_V3 = {"avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "abm", "movbe"}
_X86_64_V4 = _X86_64_V3 | {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}


class _Pointer:
    """An argument that is a pointer: of a tensor, that of its memory."""

    @staticmethod
    def from_param(value: Any) -> Any:
        return ctypes.c_void_p.from_param(value.data_ptr() if isinstance(value, torch.Tensor) else value)


_P, _A, _N, _I, _F, _D = _Pointer, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_float, ctypes.c_double
# What each function gives, and its arguments. An _I is not 0 where the function had no memory. A look and a
# neuron's step take addresses: that of a tensor costs no call of Python.
_FUNCTIONS = {
    "sltt_count": (_N, [_P, _N]),
    "sltt_same": (_N, [_P, _P, _N]),
    "sltt_pack_bits": (None, [_P, _I, _P, _N, _I]),
    "sltt_look": (_N, [_A, _I, _A, _N, _A, _I]),
    "sltt_unpack_bits": (None, [_P, _N, _P, _I, _P, _I]),
    "sltt_pack": (None, [_P, _P, _P, _F, _P, _I]),
    "sltt_forward": (_I, [_P, _P, _P, _P, _P, _I, _I]),
    "sltt_weight_gradient": (_I, [_P, _P, _P, _I, _F, _P, _P, _P, _I]),
    "sltt_input_gradient": (_I, [_P, _P, _P, _P, _I, _P, _I]),
    "sltt_dense_weight_gradient": (_I, [_P, _P, _P, _I, _P, _I]),
    "sltt_neuron": (None, [_A, _A, _N, _I, _A, _A, _A, _A, _N, _A, _A, _N, _N, _I]),
    "sltt_neuron_gradient": (_I, [_A, _A, _N, _I, _I, _I, _A, _A, _A, _A, _A, _A, _A, _A, _A, _N, _N, _I, _I]),
    "sltt_recurrent": (_I, [_P, _P, _P, _P, _P, _P, _P, _P, _N, _P, _N, _N, _N, _I]),
    "sltt_steady": (None, [_P, _I, _P, _F, _I, _P, _P, _P, _N, _I]),
    "sltt_max_pool": (None, [_P, _I, _P, _P, _P, _I]),
    "sltt_max_pool_gradient": (None, [_P, _I, _P, _P, _P, _I]),
    "sltt_running_max": (None, [_P, _I, _I, _P, _P, _P, _P, _P, _P, _I]),
    "sltt_norm": (_I, [_I, _P, _N, _N, _N, _P, _P, _P, _P, _I, _P, _D, _P, _I]),
}
_OPENMP = ("__kmpc_fork_call", "__kmpc_global_thread_num", "__kmpc_push_num_threads", "omp_get_thread_num")


class _AbsentError(Exception):
    """The machine lacks something: layers run dense, without a warning."""


class _FailedError(Exception):
    """Compiling failed where it should work: layers run dense, after one warning."""


def library() -> ctypes.CDLL | None:
    """Return the compiled kernels; None if there are none. The first call may compile, which takes a few seconds."""
    return _library()[0]


def find_loaded() -> ctypes.CDLL | None:
    """Return the compiled kernels if they are there: it compiles nothing."""
    return _library()[0] if _library.cache_info().currsize or _is_there() else None


def library_for(elements: int) -> ctypes.CDLL | None:
    """Return the compiled kernels for so many elements, by the options in force; they are compiled for many only."""
    mode = options().compile
    if mode == "off":
        return None
    return library() if mode == "on" or elements >= COMPILE_FROM else find_loaded()


def problem() -> str | None:
    """Return why there is no library, in one line; None if there is one."""
    return _library()[1]


def cache_folder() -> Path:
    """Return the folder of what was compiled on this machine."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sltt"


@functools.cache
def has_amx() -> bool:
    """Return whether the processor multiplies tiles of bfloat16."""
    return sys.platform == "linux" and b"amx_bf16" in _processor().split()


def origin() -> str:
    """Return where the library is from. Call it where `library()` is not None."""
    shipped = _find_shipped()
    return f"shipped for {shipped.name.rpartition('-')[0]}" if shipped else "compiled here"


@functools.cache
def key() -> str:
    """Digest of all that a compiled library depends on."""
    compiler = _compiler()
    try:
        version = subprocess.run([compiler, "--version"], capture_output=True, check=True).stdout
    except (OSError, subprocess.SubprocessError) as error:
        raise _FailedError(f"the C++ compiler does not run: {error}") from None
    parts = (sources(), compiler.encode(), version, " ".join(_flags()).encode(), _processor())
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]


@functools.cache
def _library() -> tuple[ctypes.CDLL | None, str | None]:
    try:
        path = _path()
        if not is_intact(path) or (path.parent == cache_folder() and not is_private(path)):
            _compile(path)
        return _open(path), None
    except _AbsentError as absent:
        return None, str(absent)
    except _FailedError as failed:
        warnings.warn(f"layers compute on spikes as on any input, since {failed}", stacklevel=3)
        return None, str(failed)


@functools.cache
def _is_there() -> bool:
    """Return whether the library is in the wheel, or an earlier process compiled it."""
    try:
        return _path().exists()
    except (_AbsentError, _FailedError):
        return False


def _path() -> Path:
    return _find_shipped() or cache_folder() / f"spikes-{key()}.so"


def _find_shipped() -> Path | None:
    """Return the wheel's library for this processor, and for no more of it than PyTorch uses; None to compile one."""
    linux = sys.platform == "linux"
    if os.environ.get("CXX") and linux:  # nothing is compiled elsewhere
        return None
    machine, capability = platform.machine().lower(), torch.backends.cpu.get_cpu_capability()
    features = set(_processor().decode().split()) if linux else _X86_64_V4  # there PyTorch's AVX implies them
    if machine in ("aarch64", "arm64"):
        name = "aarch64"
    elif machine in ("x86_64", "amd64") and "AVX512" in capability and features >= _X86_64_V4:
        name = "x86-64-v4"
    elif machine in ("x86_64", "amd64") and capability.startswith("AVX") and features >= _X86_64_V3:
        name = "x86-64-v3"
    else:
        return None
    path = SHIPPED / shipped_name(name)
    return path if is_intact(path) else None


def _open(path: Path) -> ctypes.CDLL:
    try:
        library = ctypes.CDLL(str(path))
        if sys.platform != "linux":
            _give_threads(library)
        for name, (result, arguments) in _FUNCTIONS.items():
            function = getattr(library, name)
            function.restype, function.argtypes = result, arguments
            if result is _I:
                function.errcheck = _check_memory
    except (OSError, AttributeError) as error:
        raise _FailedError(f"the compiled kernels cannot be loaded: {error}") from None
    return library


def _give_threads(library: ctypes.CDLL) -> None:
    """Give the kernels PyTorch's OpenMP; without it, as where conda has it elsewhere, they run in one thread."""
    name = "libiomp5md.dll" if sys.platform == "win32" else "libomp.dylib"
    with contextlib.suppress(OSError, AttributeError):
        openmp = ctypes.CDLL(str(Path(torch.__file__).with_name("lib") / name))
        addresses = [ctypes.cast(getattr(openmp, name), _A).value for name in _OPENMP]
        (_A * len(_OPENMP)).in_dll(library, "sltt_openmp")[:] = addresses


def _check_memory(short_of_memory: int, *_: Any) -> None:
    if short_of_memory:
        raise MemoryError("a layer has no memory for its scratch")


def _compile(path: Path) -> None:
    """Compile into another folder, and give the library its name in the cache when it is whole."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if not is_own(path.parent):
            raise _FailedError(f"the cache {path.parent} is another user's: set XDG_CACHE_HOME to a folder of yours")
        path.parent.chmod(path.parent.stat().st_mode & ~0o022)
        with tempfile.TemporaryDirectory(prefix="sltt-") as folder:
            new, part = Path(folder) / path.name, path.with_name(f"{path.name}.{os.getpid()}")
            if problem := compile_library(_compiler(), _flags(), new):
                raise _FailedError(f"compiling the kernels failed: {problem}")
            part.unlink(missing_ok=True)
            shutil.copyfile(new, part)
            part.chmod(0o700)
            part.replace(path)
    except OSError as error:
        raise _FailedError(f"the cache {path.parent} cannot be written: {error.strerror or error}") from None


def _compiler() -> str:
    if platform.machine() not in _PROCESSORS or sys.platform != "linux":
        raise _AbsentError(f"no kernels are compiled on {sys.platform}, {platform.machine()}: wheels may have some")
    for name in (os.environ.get("CXX"), "g++", "clang++"):
        if name and (path := shutil.which(name)):
            return path
    raise _AbsentError("there is no C++ compiler (apt install g++)")


def _flags() -> tuple[str, ...]:
    """Compiler flags for this processor, and for no more of it than PyTorch uses (ATEN_CPU_CAPABILITY)."""
    machine = platform.machine()
    capability = torch.backends.cpu.get_cpu_capability()
    if machine == "aarch64" or "AVX512" in capability:
        return *FLAGS, _PROCESSORS[machine]
    return *FLAGS, *((_PROCESSORS[machine], "-mno-avx512f") if capability == "AVX2" else ())


def _processor() -> bytes:
    """Model and features of the processor, which decide what `native` means to the compiler."""
    try:
        return read_processor()
    except OSError as error:
        raise _AbsentError(f"the processor is not known: {error}") from None
