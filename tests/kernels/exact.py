"""Layers on spikes against float64."""

import pytest
import torch
import torch.nn.functional as F

from sltt import kernels
from sltt.kernels import native
from sltt.kernels.layers import sparse
from sltt.kernels.spikes.bits import pack

TOLERANCE = {torch.float32: 5e-6, torch.bfloat16: 6e-3, torch.float16: 1e-3}  # of the largest value
NATIVE = pytest.mark.skipif(native.problem() is not None, reason=str(native.problem()))


def channels_last(x):
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


def spikes(shape, density):
    """0 and 1, with the channels last in memory."""
    return channels_last((torch.rand(shape) < density).float())


def near(a, b, dtype):
    assert a.dtype == dtype
    assert a.shape == b.shape
    torch.testing.assert_close(a.double(), b, rtol=0, atol=TOLERANCE[dtype] * max(1.0, b.abs().max().item()))


def applied(layer, x):
    """What a layer of a network gives in a run."""
    return kernels.run_layer(kernels.operation_of(layer), x, layer.weight, layer.bias, kernels.WeightCache())


def check_conv(x, channels, kernel, stride, padding, dtype=torch.float32, one=1.0):
    """Forward and weight gradient of a convolution of spikes."""
    layer = sparse.conv_layer(x.shape, (channels, x.shape[1], *kernel), stride, padding)
    conv = F.conv1d if len(kernel) == 1 else F.conv2d

    def dense(x, weight, bias):
        return conv(F.pad(x, [p for pair in reversed(padding) for p in pair]), weight, bias, stride=stride)

    check(layer, dense, x, dtype, one)


def check_linear(x, features, dtype=torch.float32, one=1.0):
    """Those of a linear layer."""
    check(sparse.linear_layer(x.shape, (features, x.shape[-1])), F.linear, x, dtype, one)


def check(layer, dense, x, dtype, one):
    weight, bias = (torch.randn(shape).to(dtype) for shape in (layer.weight_shape, layer.weight_shape[:1]))
    assert layer.fits
    exact = [parameter.double().requires_grad_() for parameter in (weight, bias)]
    expected = dense(one * x.double(), *exact)
    bits = pack(x)
    y = sparse.forward(layer, bits, sparse.pack_weight(layer, weight, one), bias, dtype)
    near(y, expected.detach(), dtype)
    assert layer.linear or y.movedim(1, -1).is_contiguous()
    grad_y = torch.randn(expected.shape).to(dtype)
    of_bias = torch.full((len(weight),), 7.0) if layer.sums_bias else None
    grad = sparse.weight_gradient(layer, bits, grad_y, one, of_bias)
    exact_grad, exact_of_bias = torch.autograd.grad(expected, exact, grad_y.double())
    near(grad.to(dtype), exact_grad, dtype)
    if of_bias is not None:
        near(of_bias.to(dtype), exact_of_bias, dtype)
