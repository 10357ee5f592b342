"""Weights in the forms that layers read: packed for sparse layers, and in another type."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from sltt.kernels.layers import sparse
from sltt.kernels.layers.sparse import LayerSizes


class WeightCache:
    """Weights in the forms that layers read, kept as long as nothing can have changed them.

    Args:
        calls: of the network that share the weights packed for a sparse forward, which are kept for them. In a training
            it is one: copies would take more memory than they save time. In an evaluation there is room, where
            gradients would be.

    Attributes:
        sums: of each weight that was noted: not finite where a value is not, and read in a pass over memory.
    """

    def __init__(self, calls: int = 1) -> None:
        self.calls = calls
        self._kept: Any = WeakIdKeyDictionary()  # by the weight's memory, which autograd gives back as another tensor
        self._sparse: dict[int, Tensor] = {}
        self.sums: list[Tensor] = []

    def forget(self) -> None:
        """Drop all forms, since weights may have changed."""
        self.calls = 1
        self._kept.clear()

    def note_sparse(self, weight: Tensor) -> None:
        """Note a weight of which a layer reads the rows of active inputs only: now, since sharded ones are freed."""
        if id(weight) not in self._sparse:
            self.sums.append(weight.detach().sum())
            if isinstance(weight, nn.Parameter):  # another was computed, and should not stay
                self._sparse[id(weight)] = weight

    def pack_weight(self, layer: LayerSizes, weight: Tensor, one: float, keep: bool = False) -> Tensor:
        """Return the weights as `sparse.forward` reads them; `keep` a copy in any case."""
        if self.calls == 1 and not keep:
            return sparse.pack_weight(layer, weight, one)
        return self._get(weight, one, lambda: sparse.pack_weight(layer, weight, one))

    def cast(self, weight: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the weight in another type."""
        return weight if weight.dtype == dtype else self._get(weight, dtype, lambda: weight.detach().to(dtype))

    def _get(self, weight: Tensor, form: Any, make: Callable[[], Tensor]) -> Tensor:
        forms = self._kept.setdefault(weight.untyped_storage(), {})
        key = form, weight.dtype, weight.storage_offset(), weight.shape, weight.stride()
        version = weight._version
        if key not in forms or forms[key][0] != version:
            forms[key] = version, make()
        return forms[key][1]
