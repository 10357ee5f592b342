"""BatchNorm with the statistics of all processes' samples, on GPUs and on the CPU."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sltt._torch import _BatchNorm


class SyncBatchNorm(_BatchNorm):
    """BatchNorm whose mean and variance in training are those of the samples of all processes.

        y = γ (x − μ) / √(σ² + ε) + β,   μ = Σ x / N,   σ² = Σ (x − μ)² / N

    over N values in all processes; one message a call, and one in its backward. In evaluation, and in one process
    alone, it is BatchNorm.
    """

    def _check_input_dim(self, input: Tensor) -> None:
        if input.ndim < 2:
            raise ValueError(f"expected input [B, C, ...], got shape {list(input.shape)}")

    def forward(self, input: Tensor) -> Tensor:
        """x [B, C, ...] of this process to y, of the same shape."""
        if not self.training or not dist.is_initialized() or dist.get_world_size() == 1:
            return super().forward(input)
        self._check_input_dim(input)
        mean, variance, count = self._statistics(input)
        self._track(mean.detach(), variance.detach(), count)
        scale = torch.rsqrt(variance + self.eps)
        scale = scale if self.weight is None else scale * self.weight
        shift = -mean * scale if self.bias is None else self.bias - mean * scale
        form = (1, -1, *[1] * (input.ndim - 2))
        return (input * scale.view(form) + shift.view(form)).to(input.dtype)

    def _statistics(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mean and variance [C] of all processes' x [B, C, ...], and the number of values [1]."""
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        dims = [d for d in range(x.ndim) if d != 1]
        # sums of the distance from a mean that all processes know lose no digits when they are subtracted
        origin = x.new_zeros(x.shape[1]) if self.running_mean is None else self.running_mean.to(x.dtype, copy=True)
        centred = x - origin.view(1, -1, *[1] * (x.ndim - 2))
        count = x.new_full((1,), x.numel() / x.shape[1])
        sums: Tensor = _Sum.apply(torch.cat([centred.sum(dims), centred.square().sum(dims), count]))  # type: ignore[assignment]
        first, second, total = sums.split([x.shape[1], x.shape[1], 1])
        mean = first / total
        return mean + origin, (second / total - mean.square()).clamp(min=0), total.detach()

    @torch.no_grad()
    def _track(self, mean: Tensor, variance: Tensor, count: Tensor) -> None:
        if self.running_mean is None or self.running_var is None:
            return
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        momentum = 1 / int(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), momentum)
        unbiased = variance * (count / (count - 1).clamp(min=1))
        self.running_var.lerp_(unbiased.to(self.running_var.dtype), momentum)


class _Sum(torch.autograd.Function):
    """The sum of a tensor over the processes; its gradient is the sum of theirs, since each has a part of the loss."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # type: ignore[override]
        x = x.clone()
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        grad = grad.clone()
        dist.all_reduce(grad)
        return grad


def synchronise(model: nn.Module) -> None:
    """Replace the BatchNorms inside a model by SyncBatchNorm, with their weights and statistics; names stay."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if not isinstance(child, _BatchNorm) or isinstance(child, SyncBatchNorm | nn.SyncBatchNorm):
                continue
            if type(child) in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d):
                setattr(module, name, _synchronised(child))
            else:
                raise ValueError(
                    f"sync_batchnorm knows PyTorch's BatchNorm, and {name} is a {type(child).__name__}: leave it out"
                )


def _synchronised(norm: _BatchNorm) -> SyncBatchNorm:
    tracks = norm.track_running_stats
    twin = SyncBatchNorm(norm.num_features, norm.eps, norm.momentum, norm.affine, tracks)
    twin.weight, twin.bias = norm.weight, norm.bias
    for name, buffer in norm.named_buffers(recurse=False):
        setattr(twin, name, buffer)
    return twin.train(norm.training)
