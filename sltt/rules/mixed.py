"""A window for each layer: where in the network the gradient through time is kept, and for how long."""

import re
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any, Literal

from torch import Tensor, nn

from sltt._torch import WRAPPERS
from sltt.rules.base import Rule
from sltt.rules.batch import Batch, Output
from sltt.sequence.layout import Layer, Layout
from sltt.sequence.once import add_gradients
from sltt.sequence.reach import graph_nodes, operations
from sltt.sequence.state import detach_module, state_tensors
from sltt.sequence.step import Step

Window = int | Literal["all"]
_WRAPPERS = re.compile(rf"^({'|'.join(map(re.escape, WRAPPERS))})+")


class Mixed(Rule):
    """BPTT in some layers, truncated BPTT or SLTT in others: a window of time steps for each layer of neurons.

        rule = sltt.Mixed({"features.2": "all", "features.5": 4})      # SLTT in the other layers

    The gradient is the exact one of the graph in which each layer's states become constants at the end of each of its
    windows: steps 1 … n, n+1 … 2n, and so on. With "all" in every layer it is `BPTT`, with n `TBPTT(n)`, with 1 `SLTT`.

    Memory depends on the last layer whose window is longer than a step, in the order of the network. The layers above
    it are backpropagated and freed at every step. The layers up to it keep their graph until the windows of all layers
    end at the same step. So a last layer near the input saves memory. If few layers are above it, BPTT takes no more.

    Two cases keep the graph of the whole network, for the same gradient: a graph that goes around the last layer, as
    within residual blocks, and a last layer that runs twice in a step. The first step shows that, and keeps its graph.

    Args:
        windows: window of each layer of neurons, a number of time steps or "all", by its name in the model or a pattern
            with * and ? (`fnmatch`); where several match, the first counts.
        default: window of the other layers.

    Raises:
        ValueError: a window below 1; when called, a pattern that matches no module with a state, or only some inside of
            another such module.
    """

    def __init__(self, windows: Mapping[str, Window], default: Window = 1):
        if not isinstance(windows, Mapping):
            raise ValueError(f"windows must be a window for each name of a layer, got {windows!r}")
        for name, window in [*windows.items(), ("default", default)]:
            if window != "all" and (isinstance(window, bool) or not isinstance(window, int) or window < 1):
                raise ValueError(f"the window of {name} must be 'all' or at least 1 time step, got {window!r}")
        self.windows: dict[str, Window] = {str(name): window for name, window in windows.items()}  # of YAML: {2: all}
        self.default = default

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and repr(self) == repr(other)  # windows in the same order: the first counts

    def __hash__(self) -> int:
        return hash(repr(self))

    def run(self, batch: Batch) -> Output:
        windows = self.window_lengths(batch.model, batch.steps)
        kept = [module for module, window in windows.items() if window > 1]
        cut: Any = batch.network.step
        waiting = None
        cut.begin(kept)
        for t in range(batch.steps):
            value = cut.forward(batch, t)
            if kept and (t == 0 or cut.module is None):
                waiting = value if waiting is None else waiting + value
            else:
                batch.backward(value)
                waiting = cut.chain_backward(waiting)
            del value  # so that the graph of this step is gone before the next forward
            for module, window in windows.items():
                if (t + 1) % window == 0:
                    detach_module(module)
            ended = t + 1 == batch.steps or all((t + 1) % windows[module] == 0 for module in kept)
            if ended and waiting is not None:
                batch.backward(waiting)
                waiting = None
        return batch.output()

    def step(self) -> Step:
        return _Cut()

    def window_lengths(self, model: nn.Module, steps: int) -> dict[nn.Module, int]:
        """Return the window of each module with a state, in time steps; T or more is that of the whole sequence."""
        layers = {layer.name: layer.module for layer in Layout(model).keepers if layer.differentiable}
        # neurons inside of another have its window
        outer = {name: next(n for n in layers if name == n or name.startswith(f"{n}.")) for name in layers}

        def matches(name: str, pattern: str) -> bool:
            return any(pattern == form or fnmatchcase(form, pattern) for form in (name, _WRAPPERS.sub("", name)))

        for pattern in self.windows:
            if not any(matches(name, pattern) for name in outer.values()):
                names = (_WRAPPERS.sub("", name) for name in dict.fromkeys(outer.values()))
                raise ValueError(f"no layer of neurons is called {pattern!r}; there are {', '.join(names) or 'none'}")

        def length(name: str) -> int:
            window = next((w for pattern, w in self.windows.items() if matches(name, pattern)), self.default)
            return window if isinstance(window, int) else steps

        return {module: length(outer[name]) for name, module in layers.items()}


class _Cut(Step):
    """Time steps whose graph is cut at the output of the last of the `kept` modules."""

    def begin(self, kept: list[nn.Module]) -> None:
        """Begin a sequence."""
        self.kept = kept
        self.module: nn.Module | None = None  # where the graph is cut; None if it is whole
        self._outputs: list[tuple[Tensor, Tensor]] = []  # of that module, and the leaf that stands for it above
        self._first: list[tuple[nn.Module, Any, set[Tensor]]] = []  # of the first step: what kept modules gave
        self._calls, self._in_first = 0, False

    def neuron(self, layer: Layer, *args: Any, **kwargs: Any) -> Any:
        return self._cut(layer.module, super().neuron(layer, *args, **kwargs))

    def keeper(self, layer: Layer, *args: Any, **kwargs: Any) -> Any:
        return self._cut(layer.module, super().keeper(layer, *args, **kwargs))

    def pair(self, norm: Layer, neuron: Layer, x: Tensor) -> Tensor | None:
        y = super().run_pair(norm, neuron, x) if self.may_pair(norm, neuron) else None
        return None if y is None else self._cut(neuron.module, y)

    def _cut(self, module: nn.Module, output: Any) -> Any:
        if self._in_first and module in self.kept:
            self._first.append((module, output, self._kept_states()))
        if module is not self.module or not isinstance(output, Tensor):  # a tuple is not cut: the graph stays whole
            return output
        self._calls += 1
        if not output.requires_grad:  # nothing below it is trained
            return output
        leaf = output.detach().requires_grad_()
        self._outputs.append((output, leaf))
        return leaf

    def _kept_states(self) -> set[Tensor]:
        return {state for module in self.kept for state in state_tensors(module)}

    def forward(self, batch: Batch, t: int) -> Tensor:
        """Return the loss of time step t, in a graph that is cut from the second on: the first step shows where."""
        before = _graph_of_states(self.kept)
        self._outputs, self._calls, self._in_first = [], 0, t == 0
        value = batch.forward(range(t, t + 1))
        if t == 0 and self.kept:
            # the last by name, or the one that ran last
            last = [module for module, *_ in self._first[-1:]]
            self.module = next((m for m in (self.kept[-1], *last) if self._parts(m, value, before)), None)
            self._first.clear()
        elif self.module is not None and not self._separates(value, before):
            raise RuntimeError(f"time step {t} has another graph than the first, and Mixed cannot cut it: use BPTT")
        return value

    def _parts(self, module: nn.Module, value: Tensor, before: set[Any]) -> bool:
        """Return whether the first graph could be cut at a module's output, and no state is made of it later."""
        outputs = [(output, then) for of, output, then in self._first if of is module]
        if len(outputs) != 1 or not isinstance(outputs[0][0], Tensor):
            return False
        (output, then), states = outputs[0], self._kept_states()
        if (node := output.grad_fn) is None:
            return True
        later = graph_nodes([state.grad_fn for state in states - then], stop={*before, node})
        above = graph_nodes([value.grad_fn], stop=[node]) - {node}
        below = graph_nodes([node, *(state.grad_fn for state in states)], stop=before)
        return node not in later and not operations(above & below)

    def chain_backward(self, waiting: Tensor | None) -> Tensor | None:
        """Return `waiting`, whose backward also sends what this step left at the cut through the graph below.

        The output itself is forgotten: its spikes are saved as bits in the graph.
        """
        gradients = [(output, leaf.grad) for output, leaf in self._outputs if leaf.grad is not None]
        self._outputs.clear()
        if not gradients:
            return waiting
        return add_gradients(gradients[0][0].new_zeros(()) if waiting is None else waiting, gradients)

    def _separates(self, value: Tensor, before: set[Any]) -> bool:
        """Return whether what is above the cut, and goes now, shares nothing with what is below it, and waits."""
        above = graph_nodes([value.grad_fn])
        roots = [output.grad_fn for output, _ in self._outputs]
        below = graph_nodes([*roots, *_graph_of_states(self.kept)], stop=before)
        waiting = {id(state) for module in self.kept for state in state_tensors(module)}
        waiting |= {id(node.variable) for node in below - operations(below)}
        crosses = any(id(leaf) in waiting for _, leaf in self._outputs)
        return self._calls == 1 and not crosses and not operations(above & below)


def _graph_of_states(modules: Iterable[nn.Module]) -> set[Any]:
    states = (state for module in modules for state in state_tensors(module))
    return {state.grad_fn for state in states if state.grad_fn is not None}
