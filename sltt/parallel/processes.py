"""Work that processes of a training share: one reduction of the gradients a batch, sums of metrics, decisions.

Each process takes its share of every batch, and weights its loss by that share, so that the sum over the processes is
the gradient of the whole batch: the number of processes changes nothing but rounding. The rule runs on the bare model:
however many backward passes it takes, their sum is reduced once, after the last.
"""

import os
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from itertools import zip_longest
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sltt._torch import _NormBase
from sltt.sequence.state import Stateful, role_of

if TYPE_CHECKING:
    from lightning_fabric import Fabric

A = TypeVar("A")
BUCKET = 2**25  # bytes of gradients in one message: enough to fill a network, little beside the gradients


class Processes:
    """The processes of a training, of which this is number `rank` of `count`; one alone waits for nobody."""

    def __init__(self, fabric: "Fabric"):
        self.rank, self.count = fabric.global_rank, fabric.world_size
        self._local_rank = fabric.local_rank

    def first(self, function: Callable[[], A]) -> A:
        """Call `function` in the first process, and return its result in all of them."""
        result: list[Any] = [function() if self.rank == 0 else None]
        if self.count > 1:
            dist.broadcast_object_list(result, 0, group=control())
        return result[0]

    def one_by_one(self, function: Callable[[], A]) -> A:
        """Call `function`: the first process of each machine before the others."""
        if self._local_rank > 0:
            self.wait()
            return function()
        result = function()
        self.wait()
        return result

    def wait(self) -> None:
        """Wait until all processes have come here."""
        self.highest(0)

    def sum(self, values: Sequence[float]) -> list[float]:
        """Return the sums over the processes."""
        return self._reduce(values, dist.ReduceOp.SUM)

    def highest(self, *values: float) -> list[float]:
        """Return the largest of a process, for each of the values."""
        return self._reduce(values, dist.ReduceOp.MAX)

    def gather(self, value: A) -> list[A]:
        """Return the values of all processes, in their order."""
        values: list[Any] = [value]
        if self.count > 1:
            values *= self.count
            dist.all_gather_object(values, value, group=control())
        return values

    def check_same(self, text: str, what: str) -> None:
        """Raise ValueError, in all processes, unless the text is the same in them; of a list, name the first part."""
        parts = zip_longest(*(text_of_rank.split("; ") for text_of_rank in self.gather(text)))
        if other := next((part for part in parts if len({*part}) > 1), None):
            raise ValueError(f"{what} differs between processes: {', '.join(map(str, other))}; start all of them alike")

    def reduce_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Add up the gradients of all processes, in few messages."""
        if self.count == 1:
            return
        trainable = [p for p in parameters if p.requires_grad]
        # Messages have to match, and a parameter may be without a gradient in one process alone. One that has none in
        # any stays without, or weight decay would move it. The host asks, so that no GPU is waited for.
        has_gradient = self._reduce([p.grad is not None for p in trainable], dist.ReduceOp.MAX) if trainable else []
        with_gradient = [p for p, is_there in zip(trainable, has_gradient, strict=True) if is_there]
        for p in with_gradient:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        _add_up([p.grad for p in with_gradient if p.grad is not None])

    def average_statistics(self, model: nn.Module) -> None:
        """Give all processes the mean of the running statistics of their layers, also of the user's own."""
        if self.count == 1:
            return
        own = {m for m in model.modules() if role_of(t := type(m)).kind == "other" and t.__module__[:6] != "torch."}
        keepers = [m for m in model.modules() if m in own or isinstance(m, _NormBase | Stateful)]
        running = [s for m in keepers for s in m.buffers(recurse=False) if s.is_floating_point()]
        _add_up(running)
        for statistics in running:
            statistics /= self.count

    def _reduce(self, values: Sequence[float], operation: Any) -> list[float]:
        if self.count == 1:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(tensor, operation, group=control())
        return tensor.tolist()


def control() -> Any:
    """Return a group for what is on the host, beside that for GPUs, so that a decision waits for no kernel.

    Its messages fail when a process ends, at once, also where kernels on GPUs would wait for it.
    """
    return _control_of(dist.group.WORLD)


@lru_cache(maxsize=1)
def _control_of(world: Any) -> Any:
    return dist.new_group(backend="gloo")


def disband(process: int) -> None:
    """Close the groups, and end their threads: one that frees a tensor while Python ends would abort the process."""
    _control_of.cache_clear()
    if process == os.getpid() and dist.is_initialized():  # and not in a forked one, where the threads are not
        dist.destroy_process_group()


def _add_up(tensors: Iterable[Tensor]) -> None:
    """Replace tensors by their sums over the processes, in messages of one type and of about BUCKET bytes."""
    buckets: list[list[Tensor]] = []
    for tensor in sorted(tensors, key=lambda one: str(one.dtype)):  # in the same order in every process
        last = buckets[-1] if buckets else []
        if last and last[0].dtype == tensor.dtype and sum(t.nbytes for t in (*last, tensor)) <= BUCKET:
            last.append(tensor)
        else:
            buckets.append([tensor])
    for bucket in buckets:
        flat = torch.cat([tensor.flatten() for tensor in bucket])
        dist.all_reduce(flat)
        for whole, part in zip(bucket, flat.split([whole.numel() for whole in bucket]), strict=True):
            whole.copy_(part.view_as(whole))
