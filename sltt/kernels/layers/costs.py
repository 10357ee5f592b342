"""Predict whether a sparse layer is faster than the dense one: a model of the time, with constants of three processors.

A dense layer takes a time for each of its products, a sparse one a time for each product with a spike. Whatever the
spikes, it takes one for each element that it reads and writes, and one for each weight, which it puts in another order:

    t_dense = d · products,    t_sparse = s · density · products + e · elements + w · weights / calls

where so many calls share the weights in that order: those of an evaluation do, in a training it is one. A dense layer
computes 16 outputs at a time, and unpacks the spikes for its weight gradient. Both are equal at one density, the
layer's break-even. d, s, e and w depend on the kind of layer, the data type and the instruction set, and on nothing
that a clock says: the same spikes give the same decision, whatever else the machine does.

They are nanoseconds of one thread of a Xeon (Sapphire Rapids, 2.1 GHz) on 512 to 512 features, and 64 to 64 channels of
16×16 pixels. Only their ratios decide.
"""

import functools
import math
from typing import NamedTuple

import torch

from sltt.kernels import native
from sltt.kernels.layers import winograd
from sltt.kernels.layers.sparse import LayerSizes

# Layers of fewer products run dense: they take less than the calls around them.
PRODUCTS_FROM = 2**22
_WEIGHT, _UNPACKED = {"AVX512": 0.4, "AVX2": 0.68}, 0.15
# Of a product of a dense layer, forward and for the weight gradient. Processors without AVX-512 are taken for AVX2; in
# bfloat16 without AMX, and in float16, PyTorch takes this time or longer.
_DENSE = {"AMX": (0.0016, 0.003), "AVX512": (0.0125, 0.0128), "AVX2": (0.024, 0.024)}
_WINOGRAD = {"AVX512": 0.0072, "AVX2": 0.0108}  # of one in the weight gradient of `winograd`
# Of a product with a spike, and of an element: forward, and for the weight gradient.
_FLAT = {"AVX512": ((0.037, 0.2), (0.032, 0.25)), "AVX2": ((0.054, 0.25), (0.052, 0.6))}  # of one kernel element
_CONV = {"AVX512": ((0.018, 0.22), (0.015, 0.41)), "AVX2": ((0.025, 0.2), (0.028, 0.47))}


class BreakEven(NamedTuple):
    """Densities of spikes below which the sparse layer is faster; 0 where it never is."""

    forward: float
    weight_gradient: float


@functools.lru_cache(maxsize=1024)
def break_even(layer: LayerSizes, dtype: torch.dtype, calls: int = 1) -> BreakEven:
    """Return the densities below which `layer` is faster sparse, forward and weight gradient, with weights of `calls`.

    A fixed function of its arguments on processors with the same instructions.
    """
    if layer.products < PRODUCTS_FROM:
        return BreakEven(0.0, 0.0)
    even = ((dense - rest) / spikes for dense, spikes, rest in _nanoseconds(layer, dtype, calls))
    return BreakEven(*(min(1.0, max(0.0, density)) for density in even))


def fast_gradients(layer: LayerSizes, dtype: torch.dtype) -> bool:
    """Return whether `winograd` is the faster dense gradient."""
    return winograd.supports(layer, dtype) and _dense_unit(dtype) != "AMX"


def _nanoseconds(layer: LayerSizes, dtype: torch.dtype, calls: int) -> list[tuple[float, float, float]]:
    """Return times of forward and weight gradient: dense; sparse, of spikes everywhere; sparse, of the rest."""
    forward, gradient = _DENSE[_dense_unit(dtype)]
    if fast_gradients(layer, dtype):
        gradient = _WINOGRAD[_vectors()]
    sparse, weights = (_FLAT if layer.flat else _CONV)[_vectors()], _WEIGHT[_vectors()] * math.prod(layer.weight_shape)
    outputs = layer.weight_shape[0]
    forward *= layer.products * -(-outputs // 16) * 16 / outputs
    gradient = gradient * layer.products + _UNPACKED * math.prod(layer.x_shape)
    return [
        (dense, spike * layer.products, element * elements + weights / calls)
        for dense, (spike, element), elements in zip((forward, gradient), sparse, _elements(layer), strict=True)
    ]


def _elements(layer: LayerSizes) -> tuple[int, int]:
    """Return the elements read and written forward, and for the weight gradient."""
    inputs, outputs = math.prod(layer.x_shape), math.prod(layer.y_shape)
    if layer.flat:
        return inputs + outputs, inputs + outputs
    ci, co, kernel_rows = layer.sizes[3:6]
    blocks = -(-ci // 64) * -(-co // 64)
    return inputs + outputs // co * 64 * blocks * kernel_rows, inputs + outputs


def _dense_unit(dtype: torch.dtype) -> str:
    """Return the instructions of PyTorch's dense layers."""
    return "AMX" if dtype == torch.bfloat16 and native.has_amx() else _vectors()


def _vectors() -> str:
    return "AVX512" if "AVX512" in torch.backends.cpu.get_cpu_capability() else "AVX2"
