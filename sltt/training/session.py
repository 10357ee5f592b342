"""Sessions train and measure networks: processes are started and Fabric is built once for all of it."""

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from sltt.data import Data, Splits
from sltt.kernels import using
from sltt.parallel.devices import make_fabric
from sltt.parallel.processes import Processes
from sltt.rules import unroll
from sltt.sequence.copies import copy_model
from sltt.sequence.padding import Padded, pad_batch, target_of
from sltt.training.batches import eval_loader
from sltt.training.console import Console
from sltt.training.settings import Execution

if TYPE_CHECKING:
    from lightning_fabric import Fabric


@dataclass(frozen=True)
class Session:
    """The device and the processes that are there, and what is put on them. `session` makes it."""

    settings: Execution
    fabric: "Fabric"
    processes: Processes
    copies: torch.Stream | None = None  # on which a GPU copies while it works; Apple's would mix the copies up

    def splits(self, data: Data, steps: int) -> Splits:
        """Return the splits at T = `steps`, which all processes have to find the same."""
        splits = self.processes.one_by_one(lambda: data.splits(steps))
        self.processes.check_same(splits.fingerprint, "the split of the data")
        return splits

    def choose_format(self, model: nn.Module, read: Callable[[], Tensor], static: bool) -> "Session":
        """Return this session with `channels_last` decided, where the settings leave it open.

        `read` gives images [B, C, H, W], or sequences of them, time first, if they are not `static`.
        """
        if self.settings.channels_last is not None:
            return self
        fits = prefers_channels_last(self.fabric.device) and any(isinstance(m, nn.Conv2d) for m in model.modules())
        if self.fabric.device.type == "cpu":  # where PyTorch's backward of a GroupNorm may crash then
            fits &= not any(isinstance(m, nn.GroupNorm) for m in model.modules())
        last = fits and _runs_channels_last(model, read() if static else read()[0])
        return replace(self, settings=replace(self.settings, channels_last=last))

    def set_up(self, model: nn.Module) -> Any:
        """Return the model on its device, for calls under the precision of the session."""
        if self.settings.channels_last:
            model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # pyright: ignore[reportCallIssue]
        return self.fabric.setup_module(model)

    def set_up_loss(self, loss: Any) -> Any:
        """Return the loss on the device; one that is a plain function has no weights to move."""
        return loss.to(self.fabric.device) if isinstance(loss, nn.Module) else loss

    def batch(self, x: Tensor, y: Any, per_step: bool = False) -> tuple[Tensor, Any]:
        """Return a batch on the device; images channels-last if asked for: [B, C, H, W], or [T, B, C, H, W].

        Padded sequences have the same T in all processes, which do each time step together.
        """
        if isinstance(y, Padded):
            x, y = pad_batch(x, y, int(*self.processes.highest(len(x))), per_step)
        stream = self.copies if x.device.type == "cpu" else None
        with stream or nullcontext():
            x, y = self.fabric.to_device((x, y))
        if stream:  # while the device works on the batch before
            (now := torch.accelerator.current_stream(self.fabric.device)).wait_stream(stream)
            for tensor in (x, target_of(y)):
                tensor.record_stream(now)
        if self.settings.channels_last and x.ndim == 4:
            x = x.contiguous(memory_format=torch.channels_last)
        elif self.settings.channels_last and x.ndim == 5:
            x = x.flatten(0, 1).contiguous(memory_format=torch.channels_last).unflatten(0, x.shape[:2])
        return x, y

    def read_later(self, values: list[Any]) -> Callable[[], list[Any]]:
        """Return a function that waits for values, and for no work of a GPU behind them, and gives them."""
        if self.copies is None:
            return lambda: values
        copies = [v.to("cpu", non_blocking=True) if isinstance(v, Tensor) else v for v in values]
        copied = torch.Event(self.fabric.device)
        copied.record()
        return lambda: (copied.synchronize(), copies)[1]

    def console(self, console: Console | None) -> Console:
        """Return where this process prints: the first one to `console`, the others nowhere."""
        return (console or Console()) if self.processes.rank == 0 else Console(quiet=True)

    @property
    def place(self) -> dict[str, Any]:
        """Return for which device and process a loader is."""
        return {"device": self.fabric.device, "rank": self.processes.rank, "processes": self.processes.count}

    def eval_loader(self, dataset: Any, splits: Splits, batch_size: int) -> DataLoader[Any]:
        """Every sample of a validation or test set once, in order, or this process's share of each batch."""
        return eval_loader(dataset, splits, batch_size, self.settings.workers, **self.place)


def prefers_channels_last(device: torch.device) -> bool:
    """Return whether convolutions of a device are faster with the channels last in memory."""
    return device.type == "cuda"


def _runs_channels_last(model: nn.Module, x: Tensor) -> bool:
    """Return whether a copy of the network takes images [B, C, H, W] so; `view` of a network's own would fail."""
    try:
        twin: Any = copy_model(model).eval()
        x = x.to(next(twin.parameters()).device)
        unroll(twin.to(memory_format=torch.channels_last), x.contiguous(memory_format=torch.channels_last), steps=1)
    except Exception:
        return False
    return True


@contextmanager
def session(settings: Execution) -> Iterator[Session]:
    """Start the processes; inside the block, the kernels are compiled as asked for.

    Raises ValueError for a device that is not there, or that cannot do what was asked for.
    """
    fabric = make_fabric(settings.device, settings.devices, settings.precision)
    cudnn: Any = torch.backends.cudnn
    with using(compile=settings.compile, sparse=settings.sparse), ExitStack() as before:
        # new tensors are on the CPU, whatever the user has set; and cuDNN times its algorithms once for each shape,
        # unless results are to be the same again
        if (default := torch.get_default_device()).type != "cpu":
            before.callback(torch.set_default_device, default)
            torch.set_default_device(None)
        if threading.current_thread() is threading.main_thread():  # parallel trainings would not put it back
            before.callback(setattr, cudnn, "benchmark", cudnn.benchmark)
            cudnn.benchmark |= not (cudnn.deterministic or torch.are_deterministic_algorithms_enabled())
        copies = None if fabric.device.type in ("cpu", "mps") else torch.Stream(fabric.device)
        yield Session(settings, fabric, Processes(fabric), copies)
