"""Device `gpu` in the host's memory, for `tests/test_cuda.py` without a GPU: see `tests/test_standin.py`.

Trainings and evaluations run on it, and CUDA graphs are recorded.
"""

from pathlib import Path
from types import ModuleType

import torch
from lightning_fabric import Fabric
from lightning_fabric.accelerators import CPUAccelerator
from lightning_fabric.plugins import MixedPrecision
from lightning_fabric.strategies import SingleDeviceStrategy
from torch.utils.cpp_extension import load

from sltt.training import fit, graphs, session
from tests.training.test_graphs import Recorded

# compiled once, into the cache of PyTorch's extensions
LIBRARY = load("standin", [str(Path(__file__).with_name("device.cpp"))], extra_cflags=["-O1", "-w"])
torch.utils.rename_privateuse1_backend("gpu")
MODULE, SAYS = ModuleType("torch.gpu"), {"is_available": True, "device_count": 1, "current_device": 0}
SAYS |= {"_is_in_bad_fork": False, "get_amp_supported_dtype": [torch.bfloat16], "get_rng_state": torch.get_rng_state()}
for name in ("is_initialized", "manual_seed", "manual_seed_all", "synchronize", "set_rng_state", "_lazy_init"):
    SAYS[name] = None
for name, value in SAYS.items():
    setattr(MODULE, name, lambda *_, value=value: value)
torch._register_device_module("gpu", MODULE)
torch.utils.generate_methods_for_privateuse1_backend(for_storage=True)


class Accelerator(CPUAccelerator):
    def setup_device(self, device):
        pass


def make_fabric(device, devices, precision):
    mixed = {"plugins": [MixedPrecision("bf16-mixed", "gpu")]} if precision == "bf16-mixed" else {}
    return Fabric(strategy=SingleDeviceStrategy(torch.device("gpu", 0), Accelerator()), **mixed)


session.make_fabric, session.prefers_channels_last = make_fabric, lambda device: device.type == "gpu"
graphs.CudaGraph = fit.CudaGraph = Recorded
Recorded.log = []
