"""Traces of what weight layers read: the gradient along the membrane potential, without a graph through time.

A layer W reads x[t] and feeds neurons of decay λ. With the reset a constant, ∂u[t]/∂W = Σ_{k≤t} λ^{t−k} x[k] for every
neuron that it feeds. So the weights' gradient of step t is that of the step alone, with the trace
x̂[t] = λ x̂[t−1] + x[t] in place of x[t]. A bias reads the constant 1, also the bias of a normalisation. The weight of a
normalisation has no trace, which would take one number more for each neuron. What stands between W and the neurons is
taken as it is in step t: an estimate where it is not linear, or changes with time.

Neurons whose input first charges a current of decay α have the trace of both: of x̃[t] = α x̃[t−1] + x[t] in place of
x[t]. Their step's gradient has the gain of the current already.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, TypeGuard
from weakref import ref

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList

from sltt.neurons import Delay, IntegrateAndFire, Recurrent
from sltt.rules.decays import Decay, Decays, decay_of
from sltt.sequence.layout import Layout
from sltt.sequence.state import map_tensors, state_tensors
from sltt.sequence.steps import in_backward


def _check_weights(layout: Layout, neurons: dict[nn.Module, str]) -> None:
    """Raise ValueError naming a module with weights that no trace is known for."""
    for module, layer in layout.layers.items():
        if layer.role.kind in ("weight", "norm") or isinstance(module, ParametrizationList):
            continue
        if any(p.ndim > 1 and p.requires_grad for p in module.parameters(recurse=module in neurons)):
            raise ValueError(
                f"OTTT has no traces for the weights of {layer}: it knows linear layers and convolutions outside of "
                "the neurons; use SLTT or BPTT"
            )


def node_of(y: Tensor) -> Any:
    """Return a node of the graph that stays behind a tensor where it is changed in place: of a view, its base's."""
    return getattr(y._base, "grad_fn", None) or y.grad_fn


class _Read:
    """The trace of an input, which one layer reads, or several."""

    def __init__(self, x: Tensor):
        self.value = x.detach().to(torch.promote_types(x.dtype, torch.float32), copy=True)  # the trace
        self.now = self.value  # that of each time step of the call, [n·B, ...]
        self.last: ref[Tensor] | None = ref(x)  # what was read in this time step, while its forward runs
        self.charge: Tensor | None = None  # x̃, behind neurons with a synaptic current

    def step(self, x: Tensor, decay: Decay, synaptic: float, steps: int) -> None:
        """Go n time steps on, in which x [n·B, ...] is read."""
        if (steps * len(self.value), *self.value.shape[1:]) != x.shape:
            raise ValueError(f"OTTT needs inputs of one shape, got {[*x.shape]} after {[*self.value.shape]}: use SLTT")
        self.last, before = ref(x), self.value
        self.now = before if steps == 1 else before.new_empty(x.shape)
        for x_t, now in zip(x.detach().chunk(steps), self.now.chunk(steps), strict=True):
            if synaptic:
                charge = before.clone() if self.charge is None else self.charge
                self.charge = x_t = charge.mul_(synaptic).add_(x_t)
            if isinstance(decay, Tensor):
                torch.mul(before, decay, out=now).add_(x_t)
            else:  # in one pass
                torch.add(x_t, before, alpha=decay, out=now)
            before = now
        if steps > 1:
            self.value = before.clone()  # the others may go


class _Trace:
    """The trace of one use of a layer."""

    def __init__(self, read: _Read | None):
        self.first = True  # the layer has read one time step, which is all of its trace
        self.ones: list[Decay] = [1.0]  # the trace of the constant 1, which a bias reads, in each step of the call
        self.charge_of_ones = 1.0
        self.read = read  # the trace of the layer's input
        self.decays: list[Callable[[], Decays]] = []  # λ and α of each layer of neurons that it feeds; the mean counts

    def step(self, x: Tensor | None, steps: int, runs: bool = True) -> None:
        """Go n time steps on, in which the layer reads x [n·B, ...], or does not run."""
        decay, synaptic = (sum(values) / len(self.decays) for values in zip(*(d() for d in self.decays), strict=True))
        self.first = False
        before, self.ones = self.ones[-1], []
        for _ in range(steps):
            self.charge_of_ones = synaptic * self.charge_of_ones + runs
            before = decay * before + self.charge_of_ones
            self.ones.append(before)
        if self.read is None or (x is None and runs):
            return
        if x is None:
            x = self.read.value.new_zeros(()).expand(steps * len(self.read.value), *self.read.value.shape[1:])
        if self.read.last is None:
            self.read.step(x, decay, synaptic, steps)
        elif self.read.last() is not x:
            raise ValueError("layers read one input in the first time step, and not in others: use SLTT or BPTT")

    def follows(self) -> Decays | None:
        """Return the one constant λ that it follows, without a synaptic current; None for others."""
        decays = [decay() for decay in self.decays]
        constant = not any(isinstance(decay, Tensor) or synaptic for decay, synaptic in decays)
        return decays[0] if constant and len(set(decays)) == 1 else None


class Traces:
    """The traces of a sequence, by layer and by the number of its use in a time step.

    Raises ValueError naming a layer that has none.
    """

    def __init__(self, layout: Layout, decay: float | None, inputs: bool):
        if any(layer.compiled for layer in layout.layers.values()):
            raise ValueError("compiled code hides what layers read, which OTTT traces: train before torch.compile")
        spiking = layout.neurons.values()
        # of a neuron made of neurons, the inner ones
        names = {m: n for n, m in layout.neurons.items() if not any(c in spiking for c in m.modules() if c is not m)}
        _check_weights(layout, names)
        self.inputs = inputs
        self.decays = {module: decay_of(module, name, decay) for module, name in names.items()}
        recurrent = [m for m in layout.layers if isinstance(m, Recurrent)]
        # of a recurrent layer, the neurons whose spikes it reads
        self.own = {layer: m.neuron for m in recurrent for layer in m.layer.modules()}
        inside = {part for neuron in names for part in neuron.modules()}
        # the other layers with a state, neither in neurons nor around some, and what finds their λ
        self.carriers = {
            k.module: partial(decay_of, k.module, k.name, decay)
            for k in layout.keepers
            if inputs and not (isinstance(k.module, Delay) or getattr(k.module, "timeless", False))
            if inside.isdisjoint(k.module.modules())
        }
        self.traces: dict[tuple[nn.Module, int], _Trace] = {}
        self.through_decay: dict[nn.Module, Tensor] = {}  # ∂v/∂λ of neurons with a learnable λ
        self.started: dict[Any, _Trace] = {}  # those of this time step, by the graph's node of the layer's output
        self.uses: Counter[nn.Module] = Counter()
        self.outputs: set[Any] = set()  # the graph's nodes of what layers with a state gave
        self.last: nn.Module | None = None  # the neurons that ran last
        self.ran: set[Callable[[], Decays]] = set()  # the decays of what ran in this time step
        self.in_graph = True  # the step has a backward
        self.waits = False  # graphs wait for the error through delays
        self.behind: dict[Any, Any] = {}  # the graph's node before a delay, by that of what it gave
        self.hidden: set[nn.Module] = set()  # layers that would have a trace, and ran without a graph

    def layers_without_fold(self, layout: Layout) -> list[str]:
        """Say which layers have no traces where several time steps share a call."""
        keepers = [k.module for k in layout.keepers]
        keepers = [k for k in keepers if not (isinstance(k, Recurrent) and k.runs_in_one_call())]
        inside = {m for keeper in keepers for m in keeper.modules() if m is not keeper}
        problems = []
        for module, layer in layout.layers.items():
            if module in inside and layer.role.kind == "weight":
                problems.append(f"{layer}, which runs within a layer with a state")
            bias = getattr(module, "bias", None)
            if self.inputs and layer.role.kind == "norm" and bias is not None and bias.requires_grad:
                problems.append(f"the bias of {layer}")
            if self.learns_decay(module):
                problems.append(f"the λ of {layer}")
        return problems

    def end(self, value: Tensor, steps: int) -> None:
        """After the forward of n time steps and its loss; before the backward, where checkpoints run layers again."""
        for trace in self._started_behind(value.grad_fn):
            trace.decays.clear()  # it feeds the output, too, where no state carries what it gave
        self._part()
        for (layer, use), trace in self.traces.items():
            if use >= self.uses[layer] and not self.ran.isdisjoint(trace.decays):
                trace.step(None, steps, runs=False)
        for trace in self.traces.values():
            if trace.read is not None:
                trace.read.last = None
        for kept in (self.uses, self.started, self.outputs, self.behind, self.ran):  # nodes hold memory
            kept.clear()
        self.last = None

    def _part(self) -> None:
        """Keep one trace for all new ones of one input that follow the same constant λ."""
        first: dict[_Read, Decays | None] = {}
        for trace in self.traces.values():
            if not trace.decays:  # a readout: it feeds nothing with a state
                trace.read = None
            elif trace.first and trace.read is not None:
                if trace.read not in first:
                    first[trace.read] = trace.follows()
                elif first[trace.read] is None or first[trace.read] != trace.follows():
                    trace.read = _Read(trace.read.value)

    def wants(self, layer: nn.Module) -> bool:
        """Return whether a layer that runs now, and not in a backward, is to have a trace."""
        learns = any(p.ndim > 1 and p.requires_grad for p in layer.parameters())
        reads = self.inputs or self._source(layer) is not None
        return learns and reads and not in_backward()

    def _source(self, layer: nn.Module) -> nn.Module | None:
        """Return the neurons whose spikes a layer that runs now reads; None before the first of a time step."""
        return self.own.get(layer, self.last)

    def read(self, layer: nn.Module, x: Tensor | None, steps: int = 1) -> _Trace | None:
        """Return the trace of this use of a layer, which reads x [n·B, ...], n time steps on; None for one without."""
        if in_backward():
            return self._read_again(layer)
        source = self._source(layer)
        if not self.inputs and source is None:
            return None
        key = layer, self.uses[layer]
        self.uses[layer] += 1
        if (trace := self.traces.get(key)) is None:
            if steps > 1 or not self.in_graph:
                how = "in a fold" if steps > 1 else "in a step without a backward, of OTTT(k=…)"
                raise ValueError(f"{layer} did not run in the first time step, and OTTT has no traces for it {how}")
            begun = (t.read for t in self.traces.values() if t.first and t.read is not None)
            shared = next((read for read in begun if read.last is not None and read.last() is x), None)
            trace = self.traces[key] = _Trace(None if x is None else shared or _Read(x))
            if not self.inputs and source is not None:
                trace.decays.append(self.decays[source])
        elif trace.decays:
            trace.step(x, steps)
            if self.waits and trace.read is not None and steps == 1:
                trace.read.now = trace.read.value.clone()  # the value goes on, and the graph waits
        else:
            return None
        return trace

    def learns(self, layer: nn.Module, parameter: Tensor | None) -> bool:
        """Return whether a parameter of a layer learns; of a computed one, which has no gradient, its trace says so."""
        return (layer, self.uses[layer]) in self.traces or (parameter is not None and parameter.requires_grad)

    def _read_again(self, layer: nn.Module) -> _Trace | None:
        """Return the trace of the time step whose backward runs this layer again."""
        if self.waits:
            raise ValueError(f"a checkpoint runs {layer} again, after its trace: leave it out, or credit='none'")
        if (layer, 1) in self.traces:
            raise ValueError(f"a checkpoint runs {layer} again, of several uses in a time step: leave it out for OTTT")
        trace = self.traces.get((layer, 0))
        if trace is None and (self.inputs or layer in self.hidden):
            raise ValueError(f"a checkpoint ran {layer} without a graph, which OTTT needs: set use_reentrant=False")
        return trace

    def hide(self, layer: nn.Module) -> None:
        """Note a layer that runs without a graph, which a checkpoint may run again."""
        if self._source(layer) is not None and not in_backward():
            self.hidden.add(layer)

    def wrote(self, trace: _Trace, y: Tensor) -> None:
        """Note what a layer gave, to find the neurons that it feeds."""
        if not trace.decays and not in_backward():
            self.started[node_of(y)] = trace

    def arrive(self, neuron: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> Any:
        """Before a layer of neurons runs; returns what it reads."""
        x = self._feed(neuron, inputs, named)
        if self.learns_decay(neuron):
            return (self._with_decay(neuron, x),), {}
        return inputs, named

    def learns_decay(self, neuron: nn.Module) -> TypeGuard[IntegrateAndFire]:
        """Return whether the λ of neurons has a gradient through time."""
        if not (self.inputs and isinstance(neuron, IntegrateAndFire) and neuron.v_reset is None):
            return False
        with torch.enable_grad():  # also in a step without a backward
            step, decay = neuron.kernel_step()
        return step is not None and decay is not None and (decay.requires_grad or neuron in self.through_decay)

    def _feed(self, layer: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> Tensor:
        """Note that a layer with a state is fed by those behind its input; return this input."""
        x = next(iter((*inputs, *named.values())))
        for trace in self._started_behind(x.grad_fn):
            trace.decays.append(self.decays[layer])
        return x

    def _started_behind(self, node: Any) -> Iterator[_Trace]:
        """Yield the new traces of layers whose outputs reach a node of the graph without passing other neurons."""
        waiting, seen = [node] if self.started else [], {None, *self.outputs}
        while waiting:
            node = waiting.pop()
            if node in seen:
                continue
            seen.add(node)
            if node in self.started:
                yield self.started[node]
            waiting += [behind for behind, _ in node.next_functions] + [self.behind.get(node)]

    def _with_decay(self, neuron: IntegrateAndFire, x: Tensor) -> Tensor:
        """Return x with the gradient of λ: of ∂u[t]/∂λ = v[t−1] + λ ∂v[t−1]/∂λ, what the neuron has not."""
        decay: Any = neuron.decay()
        before = neuron.start if neuron.v is None else neuron.v.detach()
        step = before - x.detach() if neuron.decay_input else before + torch.zeros_like(x)
        if neuron not in self.through_decay:
            self.through_decay[neuron] = step
            return x
        carried = self.decays[neuron]()[0] * self.through_decay[neuron]
        self.through_decay[neuron] = step + carried
        now = decay.detach()
        return x + ((decay - now) * (carried / (1 - now) if neuron.decay_input else carried)).to(x.dtype)

    def leave(self, neuron: nn.Module, output: Any) -> None:
        """After a layer of neurons ran."""
        if not in_backward():
            self.last = neuron
            self._end_at(neuron, output)

    def _end_at(self, layer: nn.Module, output: Any) -> None:
        """Note the output of a layer with a state, behind which other layers with one are fed."""
        self.ran.add(self.decays[layer])
        map_tensors(lambda y: self.outputs.add(node_of(y)), output)

    def carry(self, layer: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any], output: Any) -> None:
        """After another layer with a state ran: if gradients go through it, as in a leaky readout, it has a λ."""
        graph = any(state.requires_grad for state in state_tensors(layer))
        carries = layer in self.carriers and (graph or layer in self.decays)
        if in_backward() or not carries:
            return
        if layer not in self.decays:
            self.decays[layer] = self.carriers[layer]()
        self._feed(layer, inputs, named)
        self._end_at(layer, output)
