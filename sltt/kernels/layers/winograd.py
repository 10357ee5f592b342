"""Gradients of dense 3×3 convolutions of stride 1 in a quarter of the multiplications.

Winograd's F(4×4, 3×3), in float32 sums. Inputs and gradients are float32 or bfloat16, with the channels last in memory;
weights are of any type. Rounding errors are a few times those of PyTorch. A forward would have them too, and spikes
would differ from those of an evaluation: there is none. Any number of threads gives the same bits.
"""

import torch
from torch import Tensor

from sltt.kernels import native
from sltt.kernels.layers.sparse import LayerSizes, library, strides_of


def supports(layer: LayerSizes, dtype: torch.dtype) -> bool:
    """Return whether the kernels can do the layer, and without computing much more than its pixels."""
    _, h, w, ci, co, kh, kw, sh, sw, _, _, oh, ow = layer.sizes
    if (kh, kw, sh, sw) != (3, 3, 1, 1) or len(layer.x_shape) != 4 or ci % 32 or co % 32:
        return False
    fits = all(16 * -(-y // 4) * -(-x // 4) <= 3 * y * x for y, x in ((h, w), (oh, ow)))  # in tiles of 4×4
    return fits and dtype in (torch.float32, torch.bfloat16) and not native.problem()


def input_gradient(layer: LayerSizes, grad_y: Tensor, weight: Tensor) -> Tensor:
    """Return ∂L/∂x in the type of ∂L/∂y."""
    assert grad_y.shape == layer.y_shape
    g, weight = grad_y.movedim(1, -1).contiguous(), weight.detach().float()
    batch, channels, *pixels = layer.x_shape
    grad = g.new_empty((batch, *pixels, channels))
    library().sltt_input_gradient(
        layer.pointer, weight, strides_of(weight), g, g.dtype == torch.bfloat16, grad, torch.get_num_threads()
    )
    return grad.movedim(-1, 1)


def weight_gradient(layer: LayerSizes, x: Tensor, grad_y: Tensor) -> Tensor:
    """Return ∂L/∂weight in float32."""
    assert x.shape == layer.x_shape
    assert grad_y.shape == layer.y_shape
    assert grad_y.dtype == x.dtype
    x, g = x.movedim(1, -1).contiguous(), grad_y.movedim(1, -1).contiguous()
    outputs, inputs, *kernel = layer.weight_shape
    grad = torch.empty((outputs, *kernel, inputs), dtype=torch.float32, device="cpu")
    threads = torch.get_num_threads()
    library().sltt_dense_weight_gradient(layer.pointer, x, g, g.dtype == torch.bfloat16, grad, threads)
    return grad.movedim(-1, 1)
