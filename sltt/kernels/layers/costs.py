"""Predict whether a sparse layer is faster than the dense one: a model of the time, measured once per machine.

A dense layer takes a time for each of its products, a sparse one a time for each product with a spike. Whatever the
spikes, it takes one for each element that it reads and writes, and one for each weight, which it puts in another order:

    t_dense = d · products,    t_sparse = s · density · products + e · elements + w · weights / calls

where so many calls share the weights in that order: those of an evaluation do, in a training it is one. Both are equal
at one density, the layer's break-even. d, s, e and w are measured on one layer for each type and kind of layer, in a
fraction of a second: the processor time of one thread, which other processes hardly disturb. They are kept beside the
compiled kernels. So every run on a machine decides alike, with any number of threads.
"""

import contextlib
import functools
import hashlib
import json
import math
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Literal, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.ops import aten  # pyright: ignore[reportMissingImports]

from sltt.kernels import native
from sltt.kernels.layers import winograd
from sltt.kernels.layers.sparse import Layer, conv_layer, forward, linear_layer, pack_weight, weight_gradient
from sltt.kernels.spikes.bits import pack

# "winograd" are convolutions whose dense gradients are those of `winograd`
Kind = Literal["linear", "conv", "winograd"]
# Layers of fewer products run dense: they take less than the calls around them.
PRODUCTS_FROM = 2**22
_DENSITIES = (0.05, 0.4)
_REPEATS = 15  # so that of each, one run falls between those of other processes
# Ours are taken where they need less than this share of PyTorch's time: measured beside other work on a processor with
# AMX, PyTorch's took 2.4 times its time, ours 1.4, and ours seemed the faster by 5%.
_CLEARLY = 0.9


class BreakEven(NamedTuple):
    """Densities of spikes below which the sparse layer is faster; 0 where it never is."""

    forward: float
    weight_gradient: float


class Costs(NamedTuple):
    """Nanoseconds: of a product of the dense layer, of one with a spike, of an element, of a weight."""

    dense: float
    spike: float
    element: float
    weight: float


class LayerSeconds(NamedTuple):
    """Time of a layer on one thread, by the model."""

    dense: float
    sparse: float


@functools.lru_cache(maxsize=1024)
def break_even(layer: Layer, dtype: torch.dtype, calls: int = 1) -> BreakEven:
    """Return the densities below which `layer` is faster sparse, forward and weight gradient, with weights of `calls`.

    A fixed function of its arguments on a machine; the first call for a type and kind of layer may measure.
    """
    if layer.products < PRODUCTS_FROM:
        return BreakEven(0.0, 0.0)
    even = ((dense - rest) / spikes for dense, spikes, rest in _nanoseconds(layer, dtype, calls))
    return BreakEven(*(min(1.0, max(0.0, density)) for density in even))


def fast_gradients(layer: Layer, dtype: torch.dtype) -> bool:
    """Return whether `winograd` clearly is the faster dense gradient; the first call for a type may measure."""
    if not winograd.supports(layer, dtype):
        return False
    (_, ours), (_, pytorch) = _costs("winograd", dtype), _costs("conv", dtype)
    return ours.dense < _CLEARLY * pytorch.dense


def seconds(layer: Layer, dtype: torch.dtype, density: float) -> list[LayerSeconds]:
    """Return estimates for the forward and for the weight gradient; the input gradient is dense in any case."""
    times = _nanoseconds(layer, dtype, calls=1)
    return [LayerSeconds(dense / 1e9, (spikes * density + rest) / 1e9) for dense, spikes, rest in times]


def _nanoseconds(layer: Layer, dtype: torch.dtype, calls: int) -> list[tuple[float, float, float]]:
    """Return times of forward and weight gradient: dense; sparse, of spikes everywhere; sparse, of the rest."""
    kind: Kind = "linear" if layer.linear else "winograd" if fast_gradients(layer, dtype) else "conv"
    pairs, weights = zip(_costs(kind, dtype), _elements(layer), strict=True), math.prod(layer.weight_shape) / calls
    return [
        (c.dense * layer.products, c.spike * layer.products, c.element * elements + c.weight * weights)
        for c, elements in pairs
    ]


def _elements(layer: Layer) -> tuple[int, int]:
    """Return the elements read and written forward, and for the weight gradient.

    Forward, the sums of up to 64 outputs are read and written for each kernel row and 64 inputs; fewer take as long.
    """
    inputs, outputs = math.prod(layer.x_shape), math.prod(layer.y_shape)
    ci, co, kernel_rows = layer.sizes[3:6]
    blocks = -(-ci // 64) * -(-co // 64)
    return inputs + outputs // co * 64 * blocks * kernel_rows, inputs + outputs


def others(recorded: Mapping[str, str]) -> list[str]:
    """Return the kinds and types of layers whose costs on this machine are not those recorded."""
    if native.problem():
        return list(recorded)
    for name in recorded:
        kind, dtype = name.split()
        _costs(cast(Kind, kind), getattr(torch, dtype))
    return [name for name in recorded if USED[name] != recorded[name]]


USED: dict[str, str] = {}  # digests of the costs that decided in this process, by kind and type of the layers


@functools.cache
def _costs(kind: Kind, dtype: torch.dtype) -> list[Costs]:
    """Return the costs of forward and weight gradient: from this machine's file, or measured and written to it."""
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA", "")  # of the dense layers; the key has that of ours
    parts = (native.key(), f"torch{torch.__version__}", kind, str(dtype).removeprefix("torch."), *limit.split())
    name = f"costs-{'-'.join(parts)}.json"
    path = native.cache_folder() / name
    if (found := _read(path)) is None:
        found = _measure(kind, dtype)
        with contextlib.suppress(OSError), tempfile.TemporaryDirectory(dir=path.parent, prefix="costs-") as folder:
            new = Path(folder) / name
            new.write_text(f"{_digest(json.dumps(found))}\n{json.dumps(found)}", encoding="utf-8")
            if _read(path) is None:
                path.unlink(missing_ok=True)  # a damaged one
            os.link(new, path)  # fails where another process was first: its costs are everyone's
        found = _read(path) or found
    USED[f"{kind} {parts[3]}"] = _digest(json.dumps(found))[:16]
    return found


def _read(path: Path) -> list[Costs] | None:
    """Return the costs of a file; None where it is not there, or is not what was written."""
    try:
        digest, _, text = path.read_text(encoding="utf-8").partition("\n")
    except (OSError, UnicodeDecodeError):
        return None
    return [Costs(*row) for row in json.loads(text)] if digest == _digest(text) else None


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _measure(kind: Kind, dtype: torch.dtype) -> list[Costs]:
    """Time one layer, dense and at two densities of spikes, in turn; of each the fastest run counts."""
    if linear := kind == "linear":
        weight, x_shape = torch.ones(512, 512), (256, 512)
        layer = large = linear_layer(x_shape, weight.shape)
        many = weight
    else:
        weight, x_shape = torch.ones(64, 64, 3, 3), (16, 64, 16, 16)
        layer = conv_layer(x_shape, weight.shape, (1, 1), ((1, 1), (1, 1)))
        many = _format(torch.ones(256, 256, 3, 3), torch.float32)  # of few, the calls around would count
        large = conv_layer((16, 256, 16, 16), many.shape, (1, 1), ((1, 1), (1, 1)))
    generator = torch.Generator().manual_seed(0)  # the user's stays as it is
    inputs = [_format(torch.rand(x_shape, generator=generator) < d, dtype) for d in _DENSITIES]
    bits = [pack(x) for x in inputs]
    packed, cast, grad = pack_weight(layer, weight), _format(weight, dtype), _format(torch.ones(layer.y_shape), dtype)

    def dense_gradient() -> object:
        if linear:
            return grad.t() @ inputs[0]
        if kind == "winograd":
            return winograd.weight_gradient(layer, inputs[0], grad)
        one, mask = [1, 1], [False, True, False]
        return aten.convolution_backward(grad, inputs[0], cast, None, one, one, one, False, [0, 0], 1, mask)

    runs: list[Callable[[], object]] = [
        lambda: F.linear(inputs[0], cast) if linear else F.conv2d(inputs[0], cast, padding=1),
        lambda: forward(layer, bits[0], packed, None, dtype),
        lambda: forward(layer, bits[1], packed, None, dtype),
        dense_gradient,
        lambda: weight_gradient(layer, bits[0], grad),
        lambda: weight_gradient(layer, bits[1], grad),
        lambda: pack_weight(large, many),
    ]
    with torch.no_grad(), _one_thread():
        *times, packing = [min(t) for t in zip(*(map(_time, runs) for _ in range(_REPEATS)), strict=True)]
    given = zip(_elements(layer), (times[:3], times[3:]), strict=True)
    return [_fit(layer.products, elements, packing / many.numel(), *three) for elements, three in given]


def _fit(products: int, elements: int, weight: float, dense: float, sparse: float, denser: float) -> Costs:
    low, high = _DENSITIES
    spike = max((denser - sparse) / (high - low), dense * 1e-3) / products
    return Costs(dense / products, spike, max(0.0, sparse - low * spike * products) / elements, weight)


def _time(run: Callable[[], object]) -> float:
    start = time.thread_time_ns()
    run()
    return time.thread_time_ns() - start


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _format(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.to(dtype).contiguous(memory_format=torch.channels_last if x.ndim == 4 else torch.contiguous_format)
