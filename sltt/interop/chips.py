"""Limits of chips, checked on a NIR graph.

speck: Speck 2e. Sources: docs/speck/overview.md of sinabs, and the memory of cores in its backend/dynapcnn (3.1).
xylo: Xylo Audio 3. Source: rockpool.ai/devices/xylo-overview.html.
"""

# pyright: reportMissingImports=false, reportOptionalSubscript=false

from typing import Any, Literal, get_args

import nir
import numpy as np

from sltt import checks

Chip = Literal["speck", "xylo"]
_CORES = [(16, 64)] * 3 + [(32, 32)] * 2 + [(64, 16)] * 2 + [(16, 16)] * 2  # Ki of weights and of neurons, on Speck
_NEURONS, _LINEAR = nir.IF | nir.LIF | nir.CubaLIF, nir.Affine | nir.Linear


def check_chip(graph: nir.NIRGraph, chip: Chip) -> list[str]:
    """Return a line for each layer of a graph, and one for all: that it fits on a chip, or a limit that it breaks.

    Limits are sizes, and kinds of layers and neurons. Not checked are weights of 8 bits and rates of events.

    Args:
        graph: what `to_nir` returns.
        chip: "speck" or "xylo".
    """
    check = {"speck": _speck, "xylo": _xylo}[checks.choice("chip", chip, get_args(Chip))]
    lines, used = [], []
    for name, node in graph.nodes.items():
        before, behind = ([graph.nodes[edge[i]] for edge in graph.edges if edge[1 - i] == name] for i in (0, 1))
        if not isinstance(node, nir.Input | nir.Output):
            lines.append(f"{name} ({type(node).__name__}): {check(node, before, behind, used) or 'fits'}")
    if chip == "speck":
        together = _over({"cores": (len(used), 9)}) or (
            "" if _assign(sorted(used), _CORES) else "not enough memory in the 9 cores"
        )
    else:
        neurons, weights = np.sum([(0, 0), *used], 0)
        together = _over({"hidden neurons": (neurons, 992), "weights of hidden neurons": (weights, 992 * 64)})
    if broken := [line for line in lines if not line.endswith(": fits")]:
        together = together or f"{len(broken)} do not fit"
    return [*lines, f"all layers: {together or 'fit'}"]


def _over(limits: dict[str, tuple[Any, int]]) -> str:
    """Return the first of the limits {what: (number, at most)} that is exceeded."""
    return next(
        (f"{np.max(n):,} {what}, at most {most:,}" for what, (n, most) in limits.items() if np.max(n) > most), ""
    )


def _speck(node: Any, before: list[Any], behind: list[Any], used: list[Any]) -> str:
    """Return the limit that a layer breaks; note its Ki of weights and of neurons."""
    if isinstance(node, nir.AvgPool2d):
        plain = {*np.ravel([node.kernel_size, node.stride])} in ({1}, {2}, {4}) and not np.any(node.padding)
        return "" if plain else "only windows of 1, 2 or 4 pixels, without padding"
    if not isinstance(node, nir.Conv2d | _LINEAR):
        other = "IF" if isinstance(node, _NEURONS) else "Conv2d, Linear, AvgPool2d and Flatten"
        return "" if isinstance(node, nir.IF | nir.Flatten) else f"not on the chip, use {other}"
    if not (behind and all(isinstance(one, _NEURONS) for one in behind)):
        return "no neurons behind it, add IF"
    output, limits = (*behind[0].v_threshold.shape, 1, 1)[:3], {}
    if isinstance(node, nir.Conv2d):
        kernel, image = node.weight.shape[2:], node.input_type["input"][1:]
        limits = {"pixels of padding": (node.padding, 7), "pixels of dilation": (node.dilation, 1)}
        if not {*np.ravel(node.stride)} <= {1, 2, 4, 8}:
            return "only strides of 1, 2, 4 or 8"
    else:  # is a convolution over its whole input
        kernel = image = next((one.input_type["input"][1:] for one in before if isinstance(one, nir.Flatten)), (1, 1))
    bits = np.ceil(np.log2(np.array([np.prod(kernel), *output]))).astype(int)
    weights, neurons = node.weight[0].size // np.prod(kernel) << bits[:2].sum(), output[0] << bits[2:].sum()
    used.append((weights / 1024, neurons / 1024))
    limits |= {"pixels of a side of the input": (image, 128), "pixels of a side of the kernel": (kernel, 16)}
    limits |= {"pixels of a side of the output": (output[1:], 64), "output channels": (output[0], 1024)}
    limits |= {"weights in the memory": (weights, 64 * 1024), "neurons in the memory": (neurons, 64 * 1024)}
    one = "" if _assign(used[-1:], _CORES) else f"no core has memory for {weights:,} weights and {neurons:,} neurons"
    return _over(limits) or one


def _assign(needs: list[Any], cores: list[Any]) -> bool:
    """Return whether each pair of sizes finds a core of its own."""
    found = (i for i, core in enumerate(cores) if needs and np.all(np.less_equal(needs[-1], core)))
    return not needs or any(_assign(needs[:-1], cores[:i] + cores[i + 1 :]) for i in found)


def _xylo(node: Any, before: list[Any], behind: list[Any], used: list[Any]) -> str:
    """Return the limit that a layer breaks; note how many hidden neurons and weights of these it has."""
    if isinstance(node, nir.LIF | nir.CubaLIF):
        if node.metadata.get("reset") == "value":
            return "only a soft reset"
        if any(isinstance(one, nir.Output) for one in behind):
            inputs = [one.weight.shape[1] for one in before if isinstance(one, _LINEAR)]
            return _over({"output neurons": (node.v_threshold.size, 32), "neurons that it reads": ([0, *inputs], 128)})
        used.append((node.v_threshold.size, 0))
    elif isinstance(node, _LINEAR):
        if not (behind and all(isinstance(one, _NEURONS) for one in behind)):
            return "no neurons behind it, add LIF"
        outputs, inputs = node.weight.shape
        if any(isinstance(one, nir.Input | nir.Flatten) for one in before):
            return _over({"inputs": (inputs, 16), "neurons that read the input": (outputs, 128)})
        used.append((0, node.weight.size))
    return (
        "" if isinstance(node, nir.LIF | nir.CubaLIF | nir.Flatten | _LINEAR) else "not on the chip, use Linear and LIF"
    )
