"""Devices of a training: one, several, or several machines, through Lightning Fabric.

Processes are started by `torchrun` or Slurm, or, with `devices` above 1, by Fabric, which runs the command again for
each further process. When one ends, messages to it fail in the others, and the launcher ends what is left.
"""

import atexit
import logging
import os
import sys
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from sltt._torch import without_compiler
from sltt.parallel.processes import control, disband
from sltt.system import keep_freed_memory as keep_freed_memory

if TYPE_CHECKING:
    from lightning_fabric import Fabric

Device = Literal["auto", "cpu", "cuda", "mps"]  # "auto" is a CUDA device, or else the CPU
Precision = Literal[32, "bf16-mixed", "16-mixed"]
Graph = Literal["auto", "on", "off"]  # of a training batch


def make_fabric(device: Device = "auto", devices: int | None = None, precision: Precision = 32) -> "Fabric":
    """Fabric, with its processes started; with `16-mixed`, gradients are scaled on the CPU as they are on CUDA.

    Raises ValueError for a device that is not there, or numbers that differ from what was started.
    """
    Fabric, MixedPrecision = _import_fabric()
    if device in ("cuda", "mps") and not getattr(torch, device).is_available():
        name = {"cuda": "CUDA device", "mps": "GPU of Apple's"}[device]
        raise ValueError(f"device {device} was asked for, but PyTorch sees no {name}; `sltt doctor` says what it sees")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    started, num_nodes = count_started()
    devices = started if devices is None else devices
    if (started, num_nodes) != (1, 1) and started != devices:
        started = f"{started} processes on {num_nodes} machines were started, but {devices=} asked for"
        raise ValueError(f"{started}: leave it out, and it is taken from torchrun or Slurm")
    if device == "cuda" and devices > torch.cuda.device_count():
        seen = f"{devices} processes on this machine need a GPU each, and this one sees {torch.cuda.device_count()}"
        raise ValueError(f"{seen}; under Slurm, ask for --gpus-per-node rather than --gpus-per-task")
    options: dict[str, Any] = {"precision": precision}
    if precision == "16-mixed":
        options = {"plugins": [MixedPrecision("16-mixed", device, torch.amp.GradScaler(device))]}
    if devices * num_nodes > 1:
        options["strategy"] = _data_parallel()
    fabric = Fabric(accelerator=device, devices=devices, num_nodes=num_nodes, **options)
    if fabric.world_size > 1:
        # else each process reports for duty; which one ended is still told
        logging.getLogger("lightning_fabric.utilities").setLevel(logging.WARNING)
        fabric.launch()
        atexit.register(disband, os.getpid())
    return fabric


@without_compiler()
def _import_fabric() -> Any:
    """Import Fabric, but not torchmetrics: Fabric asks for its version, and it imports scipy and matplotlib."""
    if absent := not {"torchmetrics", "lightning_fabric"} & sys.modules.keys():
        sys.modules["torchmetrics"] = None  # type: ignore[assignment]
    try:
        from lightning_fabric import Fabric
        from lightning_fabric.plugins import MixedPrecision
    finally:
        if absent:
            del sys.modules["torchmetrics"]
    return Fabric, MixedPrecision


def count_started() -> tuple[int, int]:
    """Return the processes on this machine, and the machines, that torchrun or Slurm started; else 1 and 1."""
    if torch.distributed.is_available() and torch.distributed.is_torchelastic_launched():
        local = int(os.environ["LOCAL_WORLD_SIZE"])
        return local, int(os.environ["WORLD_SIZE"]) // local
    if "SLURM_STEP_ID" in os.environ and os.environ.get("SLURM_JOB_NAME") not in ("bash", "interactive"):
        nodes = int(os.environ.get("SLURM_NNODES", 1))
        return int(os.environ.get("SLURM_NTASKS", 1)) // nodes, nodes
    return 1, 1


def _data_parallel() -> Any:
    from lightning_fabric.strategies.ddp import DDPStrategy

    class DataParallel(DDPStrategy):
        """The model as it is, not wrapped: `Processes.reduce_gradients` is called once a batch."""

        def setup_module(self, module: nn.Module) -> Any:
            for tensor in (*module.parameters(), *module.buffers()):  # all begin with those of the first process
                torch.distributed.broadcast(tensor.detach(), 0, group=control() if tensor.is_cpu else None)
            return module

    return DataParallel()
