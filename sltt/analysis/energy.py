"""Synaptic operations of an inference, and an estimate of its energy beside that of the same network as an ANN."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from sltt.neurons import Recurrent
from sltt.rules import unroll
from sltt.sequence.hooks import keep_hooks
from sltt.sequence.layout import spiking_layers
from sltt.sequence.spikes import observe_spikes

# Energy of a 32-bit floating-point operation in a 45 nm process; Horowitz, ISSCC 2014.
PICOJOULES_MULTIPLY_ACCUMULATE = 4.6
PICOJOULES_ACCUMULATE = 0.9


@dataclass(frozen=True)
class LayerOperations:
    """A convolution or linear layer in the inference of one sample, or the matrix products in another module.

    Attributes:
        name: of the layer in the model.
        macs: multiply-accumulates of one time step, if every input counts.
        steps: in how many of the T time steps the layer runs; with `sltt.once`, it may be one.
        density: spikes for each input. A whole number k counts as k spikes, another value that is not zero as one, and
            so does each value where all are of one size, as the thresholds of a spiking twin. Of products: share of the
            multiplications of which both factors are not zero.
        spiking: its input comes from neurons, so that each spike costs an accumulate for each synapse; else it is the
            data, and costs a multiply-accumulate for each synapse. Of products: a factor is spikes.
    """

    name: str
    macs: int
    steps: int
    density: float
    spiking: bool

    @property
    def synaptic_operations(self) -> float:
        """Accumulates of all time steps, or multiply-accumulates where the input is the data."""
        return self.macs * self.steps * (self.density if self.spiking else 1.0)

    @property
    def picojoules(self) -> float:
        """Return the estimate for these."""
        return self.synaptic_operations * (PICOJOULES_ACCUMULATE if self.spiking else PICOJOULES_MULTIPLY_ACCUMULATE)

    @property
    def picojoules_as_ann(self) -> float:
        """The estimate for the layer in a network without time, where every input costs a multiply-accumulate."""
        return self.macs * PICOJOULES_MULTIPLY_ACCUMULATE


@torch.no_grad()
def synaptic_operations(model: nn.Module, x: Tensor, *, steps: int | None = None) -> list[LayerOperations]:
    """Operations of each convolution and linear layer, measured on a batch.

        sum(layer.picojoules for layer in synaptic_operations(model, x))

    A layer that runs before the first neuron of a time step reads the data, unless it is a recurrent one. Average
    pooling in front of a layer counts as spikes: hardware for spikes takes its factor into the weights. Products of two
    tensors, as in attention, count under the module that computes them; PyTorch's own attention with softmax does not.
    The estimate leaves out neurons and memory accesses: use it to compare networks, not to plan a chip.

    Args:
        model: maps one time step to logits; in the mode that it is in, so call `model.eval()` before.
        x: sequence [T, B, ...], or with `steps` a static input [B, ...].
        steps: T for a static input.
    """
    counts: dict[str, _Count] = {}
    fired = False

    def start(module: nn.Module, args: Any) -> None:
        nonlocal fired
        fired = False

    def fire(name: str, spikes: Tensor) -> None:
        nonlocal fired
        fired = True

    def count(name: str, module: Any, args: Any, kwargs: Any, out: Tensor) -> None:
        x = args[0] if args else kwargs["input"]
        one = counts.setdefault(name, _Count(spiking=fired or module in recurrent))
        one.macs += (x if isinstance(module, TRANSPOSED) else out).numel() * module.weight[0].numel()
        one.runs += 1
        one.active += _spikes(x)
        one.inputs += x.numel()

    products = _Products()
    modules = dict(model.named_modules())
    layers = {name: m for name, m in modules.items() if isinstance(m, LAYERS)}
    recurrent = {layer for m in modules.values() if isinstance(m, Recurrent) for layer in m.layer.modules()}
    with (
        keep_hooks(model.register_forward_pre_hook(start)),
        keep_hooks(*(m.register_forward_hook(partial(count, name), with_kwargs=True) for name, m in layers.items())),
        keep_hooks(*(m.register_forward_pre_hook(partial(products.enter, name)) for name, m in modules.items())),
        keep_hooks(*(m.register_forward_hook(products.leave, always_call=True) for m in modules.values())),
        observe_spikes(spiking_layers(model), fire),
        products,
    ):
        length = len(unroll(model, x, steps=steps))
    for one in products.counts.values():
        one.macs, one.runs = one.inputs, length
    batch = (x[0] if steps is None else x).shape[0]
    found = []
    for name, c in {**counts, **products.counts}.items():
        ran = min(c.runs, length)  # a layer may run more than once in a time step
        found.append(LayerOperations(name, c.macs // batch // ran, ran, c.active / c.inputs, c.spiking))
    return found


# A transposed convolution multiplies each input with its whole kernel, what it cuts off at the border included.
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, *TRANSPOSED)


@dataclass
class _Count:
    spiking: bool
    macs: int = 0  # of all samples and calls
    runs: int = 0
    active: int = 0
    inputs: int = 0


def _spikes(x: Tensor) -> int:
    """Return the number of spikes in the input of a layer; values of one size, as in a twin, are spikes."""
    if _has_one_value(x.abs()):
        return int(x.count_nonzero())
    return int(torch.where(x == x.round(), x.abs(), 1.0).sum(dtype=torch.float64))


class _Products(TorchFunctionMode):
    """Counts the matrix products of two tensors, by the module that computes them; hooks say which is entered."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: dict[str, _Count] = {}
        self._inside: list[str] = []

    def enter(self, name: str, *call: Any) -> None:
        self._inside.append(name)

    def leave(self, *call: Any) -> None:
        self._inside.pop()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if func in _MATRIX_PRODUCTS and self._inside:
            a, b = (*args, *(kwargs[name] for name in ("input", "other", "mat2") if name in kwargs))
            self._count(torch.matmul, a, b)
        elif func is torch.einsum and len(args) == 3 and _sums(args[0]) and self._inside:
            self._count(partial(torch.einsum, args[0]), *args[1:])
        return out

    def _count(self, product: Callable[..., Tensor], a: Tensor, b: Tensor) -> None:
        one = self.counts.setdefault(self._inside[-1], _Count(spiking=True))
        one.spiking &= _has_one_value(a) or _has_one_value(b)
        one.active += int(product((a != 0).double(), (b != 0).double()).sum())
        one.inputs += int(product(torch.ones_like(a).double(), torch.ones_like(b).double()).sum())


def _sums(equation: Any) -> bool:
    """Return whether an equation of einsum sums over an index that both tensors have."""
    terms, _, kept = str(equation).replace(" ", "").partition("->")
    first, _, second = terms.partition(",")
    return bool((set(first) & set(second)) - set(kept) - {"."})


def _has_one_value(x: Tensor) -> bool:
    """Return whether all values are 0 or one other, as of spikes."""
    values = x[x != 0]
    return bool((values == values[:1]).all())


_MATRIX_PRODUCTS = {torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.bmm, Tensor.bmm}
