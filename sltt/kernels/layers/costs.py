"""Predict whether a sparse layer is faster than the dense one: a model of the time, measured once per machine.

A dense layer takes a time for each of its products, a sparse one a time for each product with a spike. Whatever the
spikes, it takes one for each element that it reads and writes, and one for each weight, which it puts in another order:

    t_dense = d · products,    t_sparse = s · density · products + e · elements + w · weights / calls

where so many calls share the weights in that order: those of an evaluation do, in a training it is one. Both are equal
at one density, the layer's break-even. d, s, e and w are measured on one layer for each type and kind of layer, in a
fraction of a second: the processor time of one thread, which other processes hardly disturb. So are the gradients of a
dense 3×3 convolution, ours (`winograd`) and PyTorch's. The times are kept beside the compiled kernels. So every run on
a machine decides alike, with any number of threads.
"""

import contextlib
import functools
import json
import math
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.ops import aten  # pyright: ignore[reportMissingImports]

from sltt.kernels import native
from sltt.kernels.layers import winograd
from sltt.kernels.layers.sparse import Layer, conv_layer, forward, linear_layer, pack_weight, weight_gradient
from sltt.kernels.spikes.bits import pack

N = TypeVar("N", bound=tuple[float, ...])

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


class Dense(NamedTuple):
    """Nanoseconds of a gradient of a dense 3×3 convolution: PyTorch's, and ours."""

    pytorch: float
    ours: float


class Ours(NamedTuple):
    """Gradients of a dense convolution that are clearly faster in our kernels."""

    input_gradient: bool
    weight_gradient: bool


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
    products = layer.products
    even = ((c.dense * products - overhead) / (c.spike * products) for c, overhead in _costs_of(layer, dtype, calls))
    return BreakEven(*(min(1.0, max(0.0, density)) for density in even))


def fast_gradients(layer: Layer, dtype: torch.dtype) -> Ours:
    """Return which gradients of a dense layer are clearly faster here; the first call for a type may measure."""
    if not winograd.supports(layer, dtype):
        return Ours(False, False)
    return Ours(*(times.ours < _CLEARLY * times.pytorch for times in _dense(dtype)))


def seconds(layer: Layer, dtype: torch.dtype, density: float) -> tuple[LayerSeconds, LayerSeconds]:
    """Estimates for the forward and for the weight gradient; the input gradient is dense in any case."""
    products = layer.products
    forward, gradient = (
        LayerSeconds(c.dense * products / 1e9, (c.spike * density * products + overhead) / 1e9)
        for c, overhead in _costs_of(layer, dtype)
    )
    return forward, gradient


def _elements(layer: Layer) -> tuple[int, int]:
    """Read and written forward, and for the weight gradient.

    Forward, the sums of up to 64 outputs are read and written for each kernel row and 64 inputs; fewer take as long.
    """
    inputs, outputs = math.prod(layer.x_shape), math.prod(layer.y_shape)
    ci, co, kernel_rows = layer.sizes[3:6]
    blocks = -(-ci // 64) * -(-co // 64)
    return inputs + outputs // co * 64 * blocks * kernel_rows, inputs + outputs


def _costs_of(layer: Layer, dtype: torch.dtype, calls: int = 1) -> list[tuple[Costs, float]]:
    """Return costs of forward and weight gradient, each with the time of the sparse layer without a spike.

    The dense gradient is ours where that is faster.
    """
    forward, gradient = _costs(layer.linear, dtype)
    if fast_gradients(layer, dtype).weight_gradient:
        times = _dense(dtype)[1]
        gradient = gradient._replace(dense=gradient.dense * times.ours / times.pytorch)
    pairs, weights = zip((forward, gradient), _elements(layer), strict=True), math.prod(layer.weight_shape) / calls
    return [(c, c.element * elements + c.weight * weights) for c, elements in pairs]


@functools.cache
def _costs(linear: bool, dtype: torch.dtype) -> list[Costs]:
    """Return the costs of forward and weight gradient."""
    return _once("linear" if linear else "conv", dtype, Costs, lambda: _measure(linear, dtype))


@functools.cache
def _dense(dtype: torch.dtype) -> list[Dense]:
    """Return the times of the input gradient and the weight gradient of one convolution."""
    return _once("dense", dtype, Dense, lambda: _measure_dense(dtype))


def _once(what: str, dtype: torch.dtype, kind: Callable[..., N], measure: Callable[[], list[N]]) -> list[N]:
    """Times of two passes: from this machine's file, or measured and written to it."""
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA", "")  # of the dense layers; the key has that of ours
    parts = (native.key(), f"torch{torch.__version__}", what, str(dtype).removeprefix("torch."), *limit.split())
    name = f"costs-{'-'.join(parts)}.json"
    path = native.cache_folder() / name
    if (found := _read(path, kind)) is None:
        found = measure()
        with contextlib.suppress(OSError), tempfile.TemporaryDirectory(dir=path.parent, prefix="costs-") as folder:
            new = Path(folder) / name
            new.write_text(json.dumps(found), encoding="utf-8")
            if path.exists() and _read(path, kind) is None:  # a damaged one
                new.replace(path)
            else:
                os.link(new, path)  # fails where another process was first: its costs are everyone's
        found = _read(path, kind) or found
    return found


def _read(path: Path, kind: Callable[..., N]) -> list[N] | None:
    try:
        first, second = json.loads(path.read_text(encoding="utf-8"))
        found = [kind(*map(float, row)) for row in (first, second)]
    except (OSError, ValueError, TypeError, OverflowError, RecursionError):
        return None
    return found if all(0 <= c < math.inf for row in found for c in row) and all(row[1] for row in found) else None


def _measure(linear: bool, dtype: torch.dtype) -> list[Costs]:
    """Time one layer, dense and at two densities of spikes, in turn; of each the fastest run counts."""
    if linear:
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
    runs: list[Callable[[], object]] = [
        lambda: F.linear(inputs[0], cast) if linear else F.conv2d(inputs[0], cast, padding=1),
        lambda: forward(layer, bits[0], packed, None, dtype),
        lambda: forward(layer, bits[1], packed, None, dtype),
        lambda: grad.t() @ inputs[0] if linear else _conv_gradients(grad, inputs[0], cast, [False, True, False]),
        lambda: weight_gradient(layer, bits[0], grad),
        lambda: weight_gradient(layer, bits[1], grad),
        lambda: pack_weight(large, many),
    ]
    *times, packing = _time_fastest(runs)
    given = zip(_elements(layer), (times[:3], times[3:]), strict=True)
    return [_fit(layer.products, elements, packing / many.numel(), *three) for elements, three in given]


def _measure_dense(dtype: torch.dtype) -> list[Dense]:
    """Time the gradients of one convolution, PyTorch's and ours, in turn."""
    layer = conv_layer((16, 64, 16, 16), (64, 64, 3, 3), (1, 1), ((1, 1), (1, 1)))
    generator = torch.Generator().manual_seed(0)
    x, weight, grad = (torch.randn(s, generator=generator) for s in (layer.x_shape, layer.weight_shape, layer.y_shape))
    weight = _format(weight, torch.float32)
    x, grad, cast = (_format(tensor, dtype) for tensor in (x, grad, weight))
    times = _time_fastest(
        [
            lambda: _conv_gradients(grad, x, cast, [True, False, False]),
            lambda: winograd.input_gradient(layer, grad, weight),
            lambda: _conv_gradients(grad, x, cast, [False, True, False]),
            lambda: winograd.weight_gradient(layer, x, grad),
        ]
    )
    return [Dense(*times[i : i + 2]) for i in (0, 2)]


def _time_fastest(runs: list[Callable[[], object]]) -> list[int]:
    """Nanoseconds of the fastest turn of each, taken in turn."""
    with torch.no_grad(), _one_thread():
        return [min(t) for t in zip(*([_nanoseconds(run) for run in runs] for _ in range(_REPEATS)), strict=True)]


def _fit(products: int, elements: int, weight: float, dense: float, sparse: float, denser: float) -> Costs:
    low, high = _DENSITIES
    spike = max((denser - sparse) / (high - low), dense * 1e-3) / products
    return Costs(dense / products, spike, max(0.0, sparse - low * spike * products) / elements, weight)


def _nanoseconds(run: Callable[[], object]) -> float:
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


def _conv_gradients(grad: Tensor, x: Tensor, weight: Tensor, mask: list[bool]) -> object:
    one, none = [1, 1], [0, 0]
    return aten.convolution_backward(grad, x, weight, None, one, one, one, False, none, 1, mask)


def _format(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.to(dtype).contiguous(memory_format=torch.channels_last if x.ndim == 4 else torch.contiguous_format)
