"""The fused step of a neuron beside the plain one, at odd sizes, constants and layouts."""

import itertools
from contextlib import contextmanager

import pytest
import torch

import sltt
from sltt import kernels
from sltt.neurons import lif_step

SIZES = [0, 1, 7, 8, 9, 1023, 4096, 5000]
CONSTANTS = [
    dict(zip(("v_reset", "decay_input", "detach_reset"), values, strict=True))
    for values in itertools.product([None, 0.0, -0.3], [False, True], [False, True])
]


@contextmanager
def compiling(mode):
    if mode == "on" and (problem := kernels.compiler_problem(torch.device("cpu"))):
        pytest.skip(problem)
    with kernels.using(compile=mode):
        yield


@contextmanager
def threads(number):
    """PyTorch and the kernels use so many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def default_type(dtype):
    """New tensors of floats have this type unless another is named."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


class Steep(sltt.surrogates.Triangle):
    """Has a derivative that no kernel has."""

    def derivative(self, x):
        return 7 * super().derivative(x)


def both(v, x, constants, decay, learnable=False):
    """Spikes, v and the gradients of a few fused steps, and of the plain ones."""
    results = []
    for fused in (True, False):
        leaves = [t.detach().clone().requires_grad_() for t in (v, x)]
        rate = torch.tensor(decay, dtype=v.dtype, device=v.device, requires_grad=True) if learnable else decay
        state, total, spikes = leaves[0], 0, []
        for t in range(3):
            if fused:
                step = kernels.NeuronStep(decay=None if learnable else decay, **constants)
                s, state = kernels.neuron_step(step, state, leaves[1] * (1 - 0.3 * t), rate if learnable else None)
            else:
                s, state = lif_step(state, (leaves[1] * (1 - 0.3 * t)).to(v.dtype), decay=rate, **constants)
                s = s.to(x.dtype)
            spikes.append(s)
            weight = torch.linspace(-1, 2, s.numel()).view(s.shape).to(s.device)
            total = total + (s.double() * weight).sum() + 0.1 * state.double().sum()
        total.backward()
        grads = [leaf.grad for leaf in leaves] + ([rate.grad] if learnable else [])
        results.append((spikes, state, grads))
    return results


def layouts():
    x = 1.5 * torch.randn(4, 8, 6, 5)
    return {
        "contiguous": x,
        "channels-last": x.to(memory_format=torch.channels_last),
        "permuted": x.permute(3, 1, 0, 2),
        "gaps": (1.5 * torch.randn(4, 8, 6, 10))[..., ::2],
        "expanded": x[:, :1].expand(4, 8, 6, 5),
    }
