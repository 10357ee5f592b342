"""Limits of chips, checked on a NIR graph.

speck: Speck 2e. Sources: docs/speck/overview.md of sinabs, and the memory of cores in its backend/dynapcnn (3.1).
xylo: Xylo Audio 3. Source: rockpool.ai/devices/xylo-overview.html.
"""

# pyright: reportMissingImports=false

from collections import Counter
from collections.abc import Iterator
from typing import Any

import nir
import numpy as np

from sltt import checks

_NEURONS, _WEIGHTS = (nir.IF, nir.LIF, nir.CubaLIF), (nir.Affine, nir.Linear, nir.Conv2d)
_KINDS = {"speck": (nir.IF, nir.AvgPool2d, nir.Flatten, *_WEIGHTS), "xylo": (*_NEURONS[1:], nir.Flatten, *_WEIGHTS[:2])}
_CORES = Counter({(16, 64): 3, (32, 32): 2, (64, 16): 2, (16, 16): 2})  # of Speck: Ki of weights and of neurons


def check_chip(graph: nir.NIRGraph, chip: str) -> list[str]:
    """Return a line for each layer of a graph, and one for all: that it fits on a chip, or a limit that it breaks.

    Chips are "speck" and "xylo"; limits are sizes, and kinds of layers and neurons. Rounding is not checked.
    """
    checks.choice("chip", chip, _KINDS)
    lines, used = [], []
    for name, node in graph.nodes.items():
        before, behind = ([graph.nodes[edge[i]] for edge in graph.edges if edge[1 - i] == name] for i in (0, 1))
        problems = iter([f"not on the chip, which has {', '.join(kind.__name__ for kind in _KINDS[chip])}"])
        if isinstance(node, _WEIGHTS) and not (behind and all(isinstance(reader, _NEURONS) for reader in behind)):
            problems = iter(["no neurons behind it"])
        elif isinstance(node, _KINDS[chip]):
            problems = (_on_speck if chip == "speck" else _on_xylo)(node, before, behind, used)
        if not isinstance(node, nir.Input | nir.Output):
            lines.append(f"{name} ({type(node).__name__}): {next(problems, 'fits')}")
    if broken := sum(not line.endswith(": fits") for line in lines):
        return [*lines, f"all layers: {broken} do not fit"]
    sums = np.sum([(0, 0), *used], 0)
    limits = {"hidden neurons": (sums[0], 992), "weights of hidden neurons": (sums[1], 992 * 64)}
    problems = _over({"cores": (len(used), 9)} if chip == "speck" else limits)
    if chip == "speck" and len(used) <= 9 and not _assign(sorted(used), _CORES):
        problems = iter(["not enough memory in the 9 cores"])
    return [*lines, f"all layers: {next(problems, 'fit')}"]


def _over(limits: dict[str, tuple[Any, int]]) -> Iterator[str]:
    """Yield the limits {what: (number, at most)} that are exceeded."""
    return (f"{np.max(n):,} {what}, at most {most:,}" for what, (n, most) in limits.items() if np.max(n) > most)


def _on_speck(node: Any, before: list[Any], behind: list[Any], used: list[Any]) -> Iterator[str]:
    """Yield the limits that a layer breaks; note its Ki of weights and of neurons."""
    yield from _over({"layers that read it": (len(behind), 2)})
    if not isinstance(node, _WEIGHTS):
        sizes = {*np.ravel([node.kernel_size, node.stride])} if isinstance(node, nir.AvgPool2d) else {1}
        if sizes not in ({1}, {2}, {4}) or np.any(getattr(node, "padding", 0)):
            yield "only windows of 1, 2 or 4 pixels, without padding"
        return
    # a linear layer is a convolution over its whole input
    images: list[Any] = [flatten.input_type for flatten in before if isinstance(flatten, nir.Flatten)]
    image = images[0]["input"][1:] if images else (1, 1)
    kernel, output = image, (*behind[0].v_threshold.shape, 1, 1)[:3]
    if type(node) is nir.Conv2d:
        image, kernel = node.input_shape, node.weight.shape[2:]
        yield from _over({"pixels of padding": (node.padding, 7), "pixels of dilation": (node.dilation, 1)})
        if not {*np.ravel(node.stride)} <= {1, 2, 4, 8}:
            yield "only strides of 1, 2, 4 or 8"
    bits = np.ceil(np.log2(np.array([np.prod(kernel), *output]))).astype(int)
    weights, neurons = node.weight[0].size // np.prod(kernel) << bits[:2].sum(), output[0] << bits[2:].sum()
    used.append((weights / 1024, neurons / 1024))
    yield from _over({"pixels of a side of the input": (image, 128), "pixels of a side of the kernel": (kernel, 16)})
    yield from _over({"pixels of a side of the output": (output[1:], 64), "output channels": (output[0], 1024)})
    yield from _over({"weights in the memory": (weights, 64 * 1024), "neurons in the memory": (neurons, 64 * 1024)})
    if not _assign(used[-1:], _CORES):
        yield f"no core has memory for {weights:,} weights and {neurons:,} neurons"


def _assign(needs: list[tuple[float, float]], cores: Counter[tuple[int, int]]) -> bool:
    """Return whether each pair of sizes finds a core of its own."""
    matching = (core for core in cores if needs and needs[-1][0] <= core[0] and needs[-1][1] <= core[1])
    return not needs or any(_assign(needs[:-1], cores - Counter([core])) for core in matching)


def _on_xylo(node: Any, before: list[Any], behind: list[Any], used: list[Any]) -> Iterator[str]:
    """Yield the limits that a layer breaks; note how many hidden neurons and weights of these it has."""
    if isinstance(node, _WEIGHTS) and any(isinstance(source, nir.Input | nir.Flatten) for source in before):
        yield from _over({"inputs": (node.weight.shape[1], 16), "neurons that read the input": (len(node.weight), 128)})
    elif isinstance(node, _WEIGHTS):
        used.append((0, node.weight.size))
    elif isinstance(node, _NEURONS):
        if node.metadata.get("reset") in ("value", b"value"):
            yield "only a soft reset"
        if not any(isinstance(reader, nir.Output) for reader in behind):
            used.append((node.v_threshold.size, 0))
            return
        read = max([source.weight.shape[1] for source in before if isinstance(source, _WEIGHTS)], default=0)
        yield from _over({"output neurons": (node.v_threshold.size, 32), "neurons that it reads": (read, 128)})
