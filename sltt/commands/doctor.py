"""Say what works on this machine, and what would make it faster."""

import platform
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version

import torch

from sltt import kernels
from sltt.commands.parsing import CommandOptions
from sltt.commands.tables import Table
from sltt.system import count_cores
from sltt.training.console import Console

# package, what it is for
OPTIONAL = (
    ("triton", "the neuron step on CUDA: pip install 'sltt[gpu]'"),
    ("tonic", "event data: pip install 'sltt[events]'"),
    ("aeon", "time series: pip install 'sltt[timeseries]'"),
    ("matplotlib", "sltt report: pip install 'sltt[report]'"),
    ("jinja2", "sltt report: pip install 'sltt[report]'"),
    *((name, "sltt export: pip install 'sltt[interop]'") for name in ("nir", "onnx", "onnxscript")),
    *((name, "its networks: pip install 'sltt[interop]'") for name in ("spikingjelly", "snntorch", "norse", "sinabs")),
)


def options() -> CommandOptions:
    return CommandOptions("sltt doctor", __doc__)


def run(words: Sequence[str]) -> None:
    options().parse_args(words)
    rows = [{"what": what, "here": here, "remark": remark} for what, here, remark in findings()]
    Table(rows).show(Console())


def findings() -> list[tuple[str, str, str]]:
    """Return rows of (subject, what is there, what to do about it)."""
    compiler, layers = kernels.compiler_problem(torch.device("cpu")), kernels.library_problem()
    threads, cores, more = torch.get_num_threads(), count_cores(), "set OMP_NUM_THREADS to their number"
    sparse = "dense" if layers else kernels.library_origin()
    return [
        ("python", platform.python_version(), ""),
        ("torch", torch.__version__, ""),  # with its build, which the name of the package does not have
        *((name, _version(name) or "missing", "") for name in ("sltt", "torchvision", "lightning-fabric")),
        _device(),
        ("C++ compiler", "none" if compiler else "found", compiler or "compiles the neuron step"),
        _cuda_neurons(),
        ("spike-sparse layers", sparse, layers or "compute on active inputs only, where that is faster"),
        ("threads", f"{threads} on {cores} cores", more if threads < cores else ""),
        _half_precision(),
        *((name, _version(name) or "not installed", f"optional: for {use}") for name, use in OPTIONAL),
    ]


def _device() -> tuple[str, str, str]:
    if torch.cuda.is_available():
        name = torch.cuda.get_device_name(0)
        return "device", f"{torch.cuda.device_count()} × {name}, CUDA {torch.version.cuda}", ""
    remark = "this PyTorch is built without CUDA" if torch.version.cuda is None else "PyTorch sees no GPU"
    if torch.backends.mps.is_available():
        remark = "--device mps trains on Apple's GPU, which is untested; memory is measured on the CPU"
    return "device", f"CPU ({torch.backends.cpu.get_cpu_capability()})", remark


def _cuda_neurons() -> tuple[str, str, str]:
    device, seen = torch.device("cuda"), torch.cuda.is_available()
    problem = kernels.triton_problem(device) if seen else kernels.compiler_problem(device) or "PyTorch sees no GPU"
    used = "LIF, IF, PLIF, ChannelLIF, in a fold with the BatchNorm before them; TorchInductor compiles others"
    return "neurons on CUDA", "not in Triton" if problem else "Triton", problem or used


def _half_precision() -> tuple[str, str, str]:
    if torch.cuda.is_available():
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
        return "bf16-mixed", "fast" if fast else "emulated", "" if fast else "take --precision 16-mixed"
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}  # 2.8 has none
    fast = bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16") or capabilities.get("sve_bf16"))
    return "bf16-mixed", "fast" if fast else "emulated", "" if fast else "slower than --precision 32 on this CPU"


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
