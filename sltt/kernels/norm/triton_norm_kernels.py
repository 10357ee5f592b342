"""The kernels of `triton_norm`: statistics of a BatchNorm, its output, and its gradient.

x is [T, n]; tiles of a time step are those of `triton_kernels`, and the second dimension of the grid is the time step.
Sums are [T, 2, C], their parts [T, parts, 2, C]; factors, [4, T, C], are scale, shift, mean and inverse deviation.
"""
# pyright: reportMissingImports=false, reportGeneralTypeIssues=false, reportArgumentType=false

import triton
import triton.language as tl

from sltt.kernels.neuron.triton_kernels import _add_up, _block, _current, _standardised


@triton.jit
def _near(x_ptr, c, channels, width, COLUMNS: tl.constexpr):
    """Return the first value of each channel: sums of differences to it lose no digits to a large mean."""
    return tl.load(x_ptr + (c if COLUMNS else c * width), c < channels, other=0.0).to(tl.float32)


@triton.jit
def moments(
    x_ptr, parts_ptr, n, width, channels, parts, COLUMNS: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr
):
    """Write this program's parts of Σ d and Σ d², d = x − the first value of the channel."""
    at, there, _, _, c = _block(n, width, channels, COLUMNS, TILE, BLOCK)
    t = tl.program_id(1).to(tl.int64)
    x_ptr += t * n
    d = tl.load(x_ptr + at, there, other=0.0).to(tl.float32) - _near(x_ptr, c, channels, width, COLUMNS)
    _add_up(parts_ptr + t * parts * 2 * channels, d, d * d, there, n, width, channels, COLUMNS, TILE, BLOCK)


@triton.jit
def write_factors(
    factors_ptr, sums_ptr, x_ptr, weight_ptr, bias_ptr, mean_ptr, var_ptr,
    n, width, channels, steps, count, momentum, eps, COLUMNS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Write the factors: from sums, updating the running statistics in each step; or from these, without sums."""
    c = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    there = c < channels
    weight, bias = tl.full([CHANNELS], 1.0, tl.float32), tl.zeros([CHANNELS], tl.float32)
    if weight_ptr is not None:
        weight, bias = tl.load(weight_ptr + c, there, other=0.0), tl.load(bias_ptr + c, there, other=0.0)
    mean, var = tl.zeros([CHANNELS], tl.float32), tl.zeros([CHANNELS], tl.float32)
    if mean_ptr is not None:
        mean, var = tl.load(mean_ptr + c, there, other=0.0), tl.load(var_ptr + c, there, other=0.0)
    running_mean, running_var = mean, var
    for _ in range(steps):
        if sums_ptr is not None:
            one, other = tl.load(sums_ptr + c, there, other=0.0), tl.load(sums_ptr + channels + c, there, other=0.0)
            mean, var = one / count, tl.maximum(other / count - (one / count) * (one / count), 0.0)
            mean += _near(x_ptr, c, channels, width, COLUMNS)
            running_mean += momentum * (mean - running_mean)
            running_var += momentum * (var * (count / (count - 1.0)) - running_var)
            sums_ptr += 2 * channels
            x_ptr += n
        invstd = 1.0 / tl.sqrt(var + eps)
        tl.store(factors_ptr + c, weight * invstd, there)
        tl.store(factors_ptr + steps * channels + c, bias - mean * (weight * invstd), there)
        tl.store(factors_ptr + 2 * steps * channels + c, mean, there)
        tl.store(factors_ptr + 3 * steps * channels + c, invstd, there)
        factors_ptr += channels
    if sums_ptr is not None and mean_ptr is not None:
        tl.store(mean_ptr + c, running_mean, there)
        tl.store(var_ptr + c, running_var, there)


@triton.jit
def normalise(
    x_ptr, y_ptr, factors_ptr, n, width, channels, steps,
    COLUMNS: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write the output of a BatchNorm."""
    at, there, _, _, c = _block(n, width, channels, COLUMNS, TILE, BLOCK)
    t = tl.program_id(1)
    at += t.to(tl.int64) * n
    y = _current(x_ptr, at, there, factors_ptr, c, t, steps, channels)
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), there)


@triton.jit
def gradient_parts(
    x_ptr, grad_ptr, parts_ptr, factors_ptr, n, width, channels, parts, steps,
    COLUMNS: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write this program's parts of Σ ∂L/∂y and Σ ∂L/∂y x̂."""
    at, there, _, _, c = _block(n, width, channels, COLUMNS, TILE, BLOCK)
    t = tl.program_id(1).to(tl.int64)
    x = _standardised(x_ptr, t * n + at, there, factors_ptr, c, t, steps, channels)
    g = tl.load(grad_ptr + t * n + at, there, other=0.0).to(tl.float32)
    _add_up(parts_ptr + t * parts * 2 * channels, g, g * x, there, n, width, channels, COLUMNS, TILE, BLOCK)


@triton.jit
def gradient(
    x_ptr, grad_ptr, out_ptr, factors_ptr, sums_ptr, n, width, channels, steps, share,
    COLUMNS: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write ∂L/∂x = scale (∂L/∂y − mean ∂L/∂y − x̂ mean(∂L/∂y x̂)); `share` is that of a value in the means, or 0."""
    at, there, _, _, c = _block(n, width, channels, COLUMNS, TILE, BLOCK)
    t = tl.program_id(1)
    at += t.to(tl.int64) * n
    x = _standardised(x_ptr, at, there, factors_ptr, c, t, steps, channels)
    g = tl.load(grad_ptr + at, there, other=0.0).to(tl.float32)
    sums_ptr += t * 2 * channels + c
    g -= share * tl.load(sums_ptr, c < channels, other=0.0)
    g -= x * (share * tl.load(sums_ptr + channels, c < channels, other=0.0))
    g *= tl.load(factors_ptr + t * channels + c, c < channels, other=0.0)
    tl.store(out_ptr + at, g.to(out_ptr.dtype.element_ty), there)
