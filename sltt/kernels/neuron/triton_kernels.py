"""The kernels of `triton_step`: a neuron's time steps in one pass, and their gradient in another.

All tensors are taken as their memory, [n] of a time step and [T, n] of T, whatever their memory format. A block is
[BLOCK / 8, 8]: a thread holds eight neighbours, so that a byte of bits is made and read within it. A pointer that is
None is not read or written, and compiled away.

With values for each channel, the memory is a matrix [n / width, width]: its columns are the channels where these are
last in memory, else its rows are the channels of each sample. A block is then a tile of it, of TILE columns.

The equations, and the order in which they round, are those of equations.py. They round so if they are launched with
`enable_fp_fusion=False`, without fused multiply-adds. All is computed in float32; with a membrane potential of 16 bits,
the results of single operations are rounded to its type, STATE, as PyTorch does. Gradients are not rounded in between.
"""
# pyright: reportMissingImports=false, reportGeneralTypeIssues=false, reportArgumentType=false
# (Triton is optional, and its annotations are for its compiler)

import triton
import triton.language as tl


@triton.jit
def _block(n, width, channels, COLUMNS: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr):
    """Return the elements of this program [BLOCK / 8, 8], and which are there; the same of its bytes of bits."""
    row = tl.arange(0, BLOCK // 8)
    neighbours = tl.arange(0, 8)[None, :]
    if TILE == 0:
        rows, c = tl.program_id(0).to(tl.int64) * (BLOCK // 8) + row, 0
        at = rows[:, None] * 8 + neighbours
        there, rows_there = at < n, rows * 8 < n
    else:
        across = tl.cdiv(width, TILE)
        column = tl.program_id(0) % across * TILE + row % (TILE // 8) * 8
        row = (tl.program_id(0) // across).to(tl.int64) * (BLOCK // TILE) + row // (TILE // 8)
        first = row * width + column
        at, rows, columns = first[:, None] + neighbours, first // 8, column[:, None] + neighbours
        there, rows_there = (columns < width) & (at < n), (column < width) & (first < n)
        c = columns if COLUMNS else (row % channels).to(tl.int32)[:, None]
    return at, there, rows, rows_there, c


@triton.jit
def _add_up(
    parts_ptr, one, other, there, n, width, channels, COLUMNS: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr
):
    """Write the sums of two values over this program's elements of each channel, a part of [parts, 2, C]."""
    both = tl.reshape(tl.where(there[:, :, None], tl.join(one, other), 0.0), [BLOCK // TILE, TILE, 2])
    across = tl.cdiv(width, TILE)
    tile_row, tile_column = tl.program_id(0) // across, tl.program_id(0) % across
    if COLUMNS:
        c = tile_column * TILE + tl.arange(0, TILE)
        at, holds = tile_row.to(tl.int64) * 2 * channels + c, c < channels
    else:
        row = tile_row.to(tl.int64) * (BLOCK // TILE) + tl.arange(0, BLOCK // TILE)
        part = row // channels * across + tile_column
        at, holds = part * 2 * channels + row % channels, row * width < n
    at = at[:, None] + tl.arange(0, 2)[None, :] * channels
    tl.store(parts_ptr + at, tl.sum(both, 0 if COLUMNS else 1), holds[:, None])


@triton.jit
def _round(x, STATE: tl.constexpr):
    return x.to(STATE).to(tl.float32)


@triton.jit
def _learned(decay_ptr, decay, gain, threshold, c, channels, BY_CHANNEL: tl.constexpr):
    """Return λ, the factor of the input and V_th: those that are learned, [2, C] if BY_CHANNEL, are read."""
    if BY_CHANNEL:
        decay = tl.load(decay_ptr + c, c < channels, other=0.0).to(tl.float32)
        threshold = tl.load(decay_ptr + channels + c, c < channels, other=0.0).to(tl.float32)
    elif decay_ptr is not None:
        decay = tl.load(decay_ptr).to(tl.float32)
    if decay_ptr is not None:
        gain = _round(1.0 - decay, decay_ptr.dtype.element_ty)
    return decay, gain, threshold


@triton.jit
def _charge(v, x, decay, gain, rest, SCALES: tl.constexpr, RESTS: tl.constexpr, STATE: tl.constexpr):
    current = _round(x, STATE)
    if SCALES:
        current = _round(gain * current, STATE)
    stays = _round(decay * (_round(v - rest, STATE) if RESTS else v), STATE)
    if RESTS:
        stays = _round(rest + stays, STATE)
    return _round(stays + current, STATE)


@triton.jit
def _current(x_ptr, at, there, factors_ptr, c, t, steps, channels):
    """Return the input current; with `factors` [4, T, C], x is the input of a BatchNorm."""
    x = tl.load(x_ptr + at, there, other=0.0).to(tl.float32)
    if factors_ptr is not None:
        scale_ptr = factors_ptr + t * channels + c
        x = x * tl.load(scale_ptr, c < channels, other=0.0)
        x = x + tl.load(scale_ptr + steps * channels, c < channels, other=0.0)
    return x


@triton.jit
def _standardised(x_ptr, at, there, factors_ptr, c, t, steps, channels):
    """Return x̂ = (x − μ) / √(σ² + ε)."""
    mean_ptr = factors_ptr + (2 * steps + t) * channels + c
    x = tl.load(x_ptr + at, there, other=0.0).to(tl.float32) - tl.load(mean_ptr, c < channels, other=0.0)
    return x * tl.load(mean_ptr + steps * channels, c < channels, other=0.0)


@triton.jit
def _spikes(u, threshold, ABOVE: tl.constexpr, STATE: tl.constexpr):
    distance = _round(u - threshold, STATE)
    return (distance > 0.0 if ABOVE else distance >= 0.0).to(tl.float32)


@triton.jit
def _reset(u, s, threshold, rest, SOFT: tl.constexpr, STATE: tl.constexpr):
    falls = _round(threshold * s if SOFT else _round(u - rest, STATE) * s, STATE)
    return _round(u - falls, STATE)


@triton.jit
def _slope(x, a, b, SURROGATE: tl.constexpr):
    """Return ∂s/∂u at x = u − V_th; the numbers of surrogates, and their constants, are those of triton_step.py."""
    if SURROGATE == 0:
        y = 1.0 - tl.abs(x) / a
        return tl.where(y < 0.0, 0.0, y) / a  # NaN stays
    elif SURROGATE == 1:
        return tl.where(tl.abs(x) < a, 1.0 / b, 0.0)
    elif SURROGATE == 2:
        y = a * x
        return b / (1.0 + y * y)
    elif SURROGATE == 3:
        y = 1.0 + a * tl.abs(x)
        return b / (y * y)
    elif SURROGATE == 4:
        y = 1.0 / (1.0 + tl.exp(-a * x))
        return a * y * (1.0 - y)
    elif SURROGATE == 5:
        return b * tl.exp(-a * tl.abs(x))
    else:
        y = x / a
        return b * tl.exp(-0.5 * y * y)


@triton.jit
def _grad_u(
    grad_s, grad_v, distance, s, u, threshold, rest, a, b,
    SURROGATE: tl.constexpr, SOFT: tl.constexpr, DETACHED: tl.constexpr, FLOWS: tl.constexpr,
):  # fmt: skip
    """Return ∂L/∂u from ∂L/∂s and, if it FLOWS, ∂L/∂v; u is read for a hard reset only."""
    slope = _slope(distance, a, b, SURROGATE)
    grad_u = grad_s * slope
    if FLOWS:
        stays = 1.0 if SOFT else 1.0 - s
        if not DETACHED:
            stays = stays - slope * (threshold if SOFT else u - rest)
        grad_u = grad_u + grad_v * stays
    return grad_u


@triton.jit
def steps_forward(
    s_ptr, v_out_ptr, u_out_ptr, bits_ptr, counts_ptr, v_ptr, x_ptr, decay_ptr, factors_ptr,
    n, width, channels, steps, decay, gain, threshold, rest,
    SOFT: tl.constexpr, RESTS: tl.constexpr, SCALES: tl.constexpr, ABOVE: tl.constexpr, EVERY: tl.constexpr,
    BY_CHANNEL: tl.constexpr, COLUMNS: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write the spikes of T steps, their number, the last membrane potential or EVERY one, and what else has a pointer.

    A program counts its own spikes, over all steps: `counts` has an element for each.
    """
    at, there, rows, rows_there, c = _block(n, width, channels, COLUMNS, TILE, BLOCK)
    decay, gain, threshold = _learned(decay_ptr, decay, gain, threshold, c, channels, BY_CHANNEL)
    STATE: tl.constexpr = v_ptr.dtype.element_ty
    v = tl.load(v_ptr + at, there, other=0.0).to(tl.float32)
    count = tl.zeros([BLOCK // 8], tl.float32)  # in int32, a kernel has a stack
    for t in range(steps):
        x = _current(x_ptr, at, there, factors_ptr, c, t, steps, channels)
        u = _charge(v, x, decay, gain, rest, SCALES, RESTS, STATE)
        s = _spikes(u, threshold, ABOVE, STATE)
        v = _reset(u, s, threshold, rest, SOFT, STATE)
        tl.store(s_ptr + at, s.to(s_ptr.dtype.element_ty), there)
        x_ptr += n
        s_ptr += n
        if EVERY:
            tl.store(v_out_ptr + at, v.to(STATE), there)
            v_out_ptr += n
        if u_out_ptr is not None:
            tl.store(u_out_ptr + at, u.to(STATE), there)
            u_out_ptr += n
        ones = tl.where(there, s, 0.0)
        count += tl.sum(ones, axis=1)
        if bits_ptr is not None:
            bits = tl.sum(ones.to(tl.int32) << tl.arange(0, 8)[None, :], axis=1)
            tl.store(bits_ptr + rows, bits.to(tl.uint8), rows_there)
            bits_ptr += n // 8
    if not EVERY:
        tl.store(v_out_ptr + at, v.to(STATE), there)
    tl.store(counts_ptr + tl.program_id(0), tl.sum(count.to(tl.int32)))


@triton.jit
def _step_back(
    kept, s, distance, v, grad_v, of_decay, of_threshold, t, steps, at, there, c,
    grad_x_ptr, grad_decay_ptr, norm_parts_ptr, grad_s_ptr, x_ptr, factors_ptr,
    n, width, channels, parts, decay, gain, threshold, rest, a, b,
    SURROGATE: tl.constexpr, SOFT: tl.constexpr, SCALES: tl.constexpr, DETACHED: tl.constexpr, FLOWS: tl.constexpr,
    COLUMNS: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write ∂L/∂x of time step t, and the BatchNorm's sums; return ∂L/∂v before it, and sums for ∂L/∂λ and ∂L/∂V_th."""
    here = tl.cast(n, tl.int64) * t + at
    grad_s = tl.zeros([BLOCK // 8, 8], tl.float32)
    if grad_s_ptr is not None:
        grad_s = tl.load(grad_s_ptr + here, there, other=0.0).to(tl.float32)
    grad_u = _grad_u(grad_s, grad_v, distance, s, kept, threshold, rest, a, b, SURROGATE, SOFT, DETACHED, FLOWS)
    grad_x = (grad_u * gain if SCALES else grad_u).to(grad_x_ptr.dtype.element_ty)
    tl.store(grad_x_ptr + here, grad_x, there)
    if norm_parts_ptr is not None:
        x = _standardised(x_ptr, here, there, factors_ptr, c, t, steps, channels)
        g, step_parts_ptr = grad_x.to(tl.float32), norm_parts_ptr + tl.cast(parts, tl.int64) * 2 * channels * t
        _add_up(step_parts_ptr, g, g * x, there, n, width, channels, COLUMNS, TILE, BLOCK)
    if grad_decay_ptr is not None:
        moved = v - rest
        if SCALES:
            moved = moved - _current(x_ptr, here, there, factors_ptr, c, t, steps, channels)
        of_decay += grad_u * moved
        of_threshold += grad_v * (1.0 - s) - grad_u
    return grad_u * decay, of_decay, of_threshold


@triton.jit
def _finish(
    grad_v, of_decay, of_threshold, at, there, grad_first_ptr, grad_decay_ptr, n, width, channels,
    BY_CHANNEL: tl.constexpr, COLUMNS: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write ∂L/∂v before the first step, and this program's part of ∂L/∂λ, and of ∂L/∂V_th BY_CHANNEL."""
    if grad_first_ptr is not None:
        tl.store(grad_first_ptr + at, grad_v.to(grad_first_ptr.dtype.element_ty), there)
    if grad_decay_ptr is not None:
        if BY_CHANNEL:
            _add_up(grad_decay_ptr, of_decay, of_threshold, there, n, width, channels, COLUMNS, TILE, BLOCK)
        else:
            tl.store(grad_decay_ptr + tl.program_id(0), tl.sum(tl.where(there, of_decay, 0.0)))


@triton.jit
def steps_backward(
    grad_x_ptr, grad_first_ptr, grad_decay_ptr, norm_parts_ptr, grad_s_ptr, grad_v_ptr, kept_ptr, s_ptr, v_ptr, x_ptr,
    decay_ptr, factors_ptr, n, width, channels, parts, steps, decay, gain, threshold, rest, a, b,
    SURROGATE: tl.constexpr, SOFT: tl.constexpr, SCALES: tl.constexpr, ABOVE: tl.constexpr, DETACHED: tl.constexpr,
    CUT: tl.constexpr, FLOWS: tl.constexpr,
    BY_CHANNEL: tl.constexpr, COLUMNS: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write ∂L/∂x of T steps, ∂L/∂v before the first, and this program's part of ∂L/∂λ, and of ∂L/∂V_th BY_CHANNEL.

    With `factors`, x is the input of a BatchNorm: write ∂L/∂y of its output for ∂L/∂x, and this program's part of
    Σ ∂L/∂y and Σ ∂L/∂y x̂, [T, parts, 2, C].

    `kept` is v after each step for a soft reset, whose spikes are in `s`, as they are or as bits; else u. `grad_v` is
    ∂L/∂v after the last step. v, before the first step, is read for ∂L/∂λ; so is x, if the step SCALES it.
    """
    at, there, rows, rows_there, c = _block(n, width, channels, COLUMNS, TILE, BLOCK)
    STATE: tl.constexpr = kept_ptr.dtype.element_ty
    decay, gain, threshold = _learned(decay_ptr, decay, gain, threshold, c, channels, BY_CHANNEL)
    grad_v = tl.zeros([BLOCK // 8, 8], tl.float32)
    if grad_v_ptr is not None:
        grad_v = tl.load(grad_v_ptr + at, there, other=0.0).to(tl.float32)
    of_decay, of_threshold = tl.zeros([BLOCK // 8, 8], tl.float32), tl.zeros([BLOCK // 8, 8], tl.float32)
    for back in range(steps):
        t = tl.cast(steps - 1 - back, tl.int64)
        kept = tl.load(kept_ptr + t * n + at, there, other=0.0).to(tl.float32)
        if not SOFT:
            s = _spikes(kept, threshold, ABOVE, STATE)
        elif s_ptr.dtype.element_ty == tl.uint8:
            byte = tl.load(s_ptr + t * (n // 8) + rows, rows_there, other=0).to(tl.int32)
            s = ((byte[:, None] >> tl.arange(0, 8)[None, :]) & 1).to(tl.float32)
        else:
            s = tl.load(s_ptr + t * n + at, there, other=0.0).to(tl.float32)
        v = grad_v  # of what is learned alone, v before the step is read
        if grad_decay_ptr is not None:
            if t == 0:
                v = tl.load(v_ptr + at, there, other=0.0).to(tl.float32)
            else:
                v = tl.load(kept_ptr + (t - 1) * n + at, there, other=0.0).to(tl.float32)
                if not SOFT:
                    v = _reset(v, _spikes(v, threshold, ABOVE, STATE), threshold, rest, SOFT, STATE)
        distance = kept - (threshold * (1.0 - s) if SOFT else threshold)
        grad_v, of_decay, of_threshold = _step_back(
            kept, s, distance, v, grad_v, of_decay, of_threshold, t, steps, at, there, c,
            grad_x_ptr, grad_decay_ptr, norm_parts_ptr, grad_s_ptr, x_ptr, factors_ptr,
            n, width, channels, parts, decay, gain, threshold, rest, a, b,
            SURROGATE, SOFT, SCALES, DETACHED, FLOWS, COLUMNS, TILE, BLOCK,
        )  # fmt: skip
        if CUT and t > 0:
            grad_v = tl.zeros([BLOCK // 8, 8], tl.float32)
    _finish(
        grad_v, of_decay, of_threshold, at, there, grad_first_ptr, grad_decay_ptr, n, width, channels,
        BY_CHANNEL, COLUMNS, TILE, BLOCK,
    )  # fmt: skip


@triton.jit
def steps_replayed(
    grad_x_ptr, grad_first_ptr, grad_decay_ptr, norm_parts_ptr, grad_s_ptr, grad_v_ptr, v_ptr, x_ptr, decay_ptr,
    factors_ptr, n, width, channels, parts, decay, gain, threshold, rest, threshold_again, rest_again, a, b,
    T: tl.constexpr, SURROGATE: tl.constexpr, SOFT: tl.constexpr, RESTS: tl.constexpr, SCALES: tl.constexpr,
    ABOVE: tl.constexpr, DETACHED: tl.constexpr, CUT: tl.constexpr,
    BY_CHANNEL: tl.constexpr, COLUMNS: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write what `steps_backward` does, from v before the first step and x: run the steps again.

    With CUT, each step's gradient is written as it runs; else its u is kept in registers. Threshold and rest are given
    twice: a compiler that knew them to be the same would keep in registers what it can compute from u.
    """
    at, there, _, _, c = _block(n, width, channels, COLUMNS, TILE, BLOCK)
    STATE: tl.constexpr = v_ptr.dtype.element_ty
    decay, gain, threshold = _learned(decay_ptr, decay, gain, threshold, c, channels, BY_CHANNEL)
    if BY_CHANNEL:
        threshold_again = threshold
    nothing = tl.zeros([BLOCK // 8, 8], tl.float32)
    last = nothing
    if grad_v_ptr is not None:
        last = tl.load(grad_v_ptr + at, there, other=0.0).to(tl.float32)
    of_decay, of_threshold = tl.zeros([BLOCK // 8, 8], tl.float32), tl.zeros([BLOCK // 8, 8], tl.float32)
    first = tl.load(v_ptr + at, there, other=0.0).to(tl.float32)
    v, us, grad_first = first, (), last
    for t in tl.static_range(T):
        x = _current(x_ptr, tl.cast(n, tl.int64) * t + at, there, factors_ptr, c, t, T, channels)
        u = _charge(v, x, decay, gain, rest, SCALES, RESTS, STATE)
        s = _spikes(u, threshold, ABOVE, STATE)
        if CUT:
            grad_v, of_decay, of_threshold = _step_back(
                u, s, u - threshold, v, last if t == T - 1 else nothing, of_decay, of_threshold, t, T, at, there, c,
                grad_x_ptr, grad_decay_ptr, norm_parts_ptr, grad_s_ptr, x_ptr, factors_ptr,
                n, width, channels, parts, decay, gain, threshold, rest, a, b,
                SURROGATE, SOFT, SCALES, DETACHED, grad_v_ptr is not None and t == T - 1, COLUMNS, TILE, BLOCK,
            )  # fmt: skip
            grad_first = grad_v if t == 0 else grad_first
        else:
            us = us + (u,)
        v = _reset(u, s, threshold, rest, SOFT, STATE)
    for back in tl.static_range(0 if CUT else T):
        u = us[T - 1 - back]
        # read again where the values of each channel take the registers
        v = tl.load(v_ptr + at, there, other=0.0).to(tl.float32) if BY_CHANNEL else first
        if back < T - 1:
            before = us[T - 2 - back]
            s = _spikes(before, threshold_again, ABOVE, STATE)
            v = _reset(before, s, threshold_again, rest_again, SOFT, STATE)
        grad_first, of_decay, of_threshold = _step_back(
            u, _spikes(u, threshold_again, ABOVE, STATE), u - threshold_again, v, grad_first, of_decay, of_threshold,
            T - 1 - back, T, at, there, c, grad_x_ptr, grad_decay_ptr, norm_parts_ptr, grad_s_ptr, x_ptr, factors_ptr,
            n, width, channels, parts, decay, gain, threshold_again, rest_again, a, b,
            SURROGATE, SOFT, SCALES, DETACHED, grad_v_ptr is not None if back == 0 else True, COLUMNS, TILE, BLOCK,
        )  # fmt: skip
    _finish(
        grad_first, of_decay, of_threshold, at, there, grad_first_ptr, grad_decay_ptr, n, width, channels,
        BY_CHANNEL, COLUMNS, TILE, BLOCK,
    )  # fmt: skip
