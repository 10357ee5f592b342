"""Try whether time steps may share a call of a network: run a real batch on copies, step by step and in shared calls.

The copies are in float64, where rounding hides no difference above 1e-9 of the largest value; a network that does not
run so is compared in its own types, down to 2e-5. Logits, the gradients of all parameters as the rule cuts them, the
states, and the buffers are compared. The loss is a sum of the logits with fixed weights, so that nothing of the user's
but the network runs again.

Then once more with other weights, other values in each time step, and neurons that pass on asinh of their input: what
the batch has behind silent neurons, or weights that are zero at first, is compared too.
"""

import random
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sltt import kernels
from sltt._torch import DispatchMode, _disable_current_modes, _DropoutNd, get_rng_states, keep_generators, unwrapped
from sltt.neurons.dropout import Dropout
from sltt.rules.batch import Backward, Batch, Fold
from sltt.sequence.copies import copy_model
from sltt.sequence.hooks import without_marked_hooks
from sltt.sequence.layout import Layer, layout_of
from sltt.sequence.reach import graph_nodes, operations
from sltt.sequence.run import Run
from sltt.sequence.step import Step
from sltt.sequence.steps import Sequence

RunRule = Callable[[Run, int, Backward], Tensor]  # runs a rule with so many steps in a call; gives the logits
_PRECISE, _ROUGH = 1e-9, 2e-5


class PlainError(Exception):
    """A network does not run step by step on a copy: the batch itself shows why."""


class _MovesError(Exception):
    """A network gives other results when it runs again."""


class ProbeLoss:
    """A sum of a time step's logits with weights of its own, neither drawn nor read; its target is the step."""

    per_step = True

    def __call__(self, logits: Tensor, step: Tensor) -> Tensor:
        return (logits * _spread(logits, 5.3 * step.to(logits.device))).sum()


def _spread(like: Tensor, shift: Any = 0.0) -> Tensor:
    """Return numbers between -1 and 1 in the shape of a tensor."""
    places = torch.arange(like.numel(), device=like.device, dtype=torch.float64)
    return (1.7 * places + shift).sin().view_as(like).to(like)


class _ReadsAndDraws(DispatchMode):
    """Sees whether operations read the value of a tensor, or draw random numbers; `found` says so."""

    found: str | None = None
    ours = False  # within a layer of neurons

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not self.ours and torch.Tag.data_dependent_output in func.tags:
            self.found = "decides by the value of a tensor"
        may_draw = not self.ours and torch.Tag.nondeterministic_seeded in func.tags
        before = get_rng_states() if may_draw else {}
        result = func(*args, **(kwargs or {}))
        if any(not torch.equal(state, get_rng_states()[device]) for device, state in before.items()):
            self.found = "draws random numbers"
        return result


class _Opened(Step):
    """Time steps whose neurons pass on what they read; `watch` sees the other operations."""

    def __init__(self) -> None:
        self.watch = _ReadsAndDraws()
        self.masks = 0  # elements of the masks that dropouts draw

    def handler(self, layer: Layer, folds: bool) -> Any:
        return self.keeper if is_dropout(layer.module) else super().handler(layer, folds)

    def neuron(self, layer: Layer, *args: Any, **kwargs: Any) -> Any:
        self.watch.ours = True
        y = super().neuron(layer, *args, **kwargs)
        self.watch.ours = False
        return y if layer.advance is None or len(args) != 1 else args[0].asinh()  # which keeps large values in bounds

    def keeper(self, layer: Layer, *args: Any, **kwargs: Any) -> Any:
        self.watch.ours = type(layer.module).__module__.startswith("sltt.")
        self.masks += args[0].numel() if is_dropout(layer.module) else 0
        y = super().keeper(layer, *args, **kwargs)
        self.watch.ours = False
        return y


def run_cut(run: Run, fold: int, backward: Backward) -> Tensor:
    """Run the time steps of a sequence, each with a backward of its own; return the logits."""
    batch = Batch(run, torch.arange(run.sequence.steps), ProbeLoss(), backward, fold=Fold(fold, fold))
    for t in range(0, batch.steps, fold):
        value = batch.forward(range(t, min(t + fold, batch.steps)), cut=True)
        if value.requires_grad:
            batch.backward(value)
        batch.detach()
    return batch.output().logits


def find_difference(run: Run, fold: int, make_step: Callable[[], Step], run_rule: RunRule) -> str | None:
    """Return what differs where `fold` time steps of a run's batch share a call of the network; None if nothing does.

    Raises ValueError for a network that reads something outside of it that moves, PlainError for one that does not run,
    and errors that are faults of this package.
    """
    problem, grown = None, run.sequence.x.is_floating_point() and not run.sequence.static
    for precise in (True, False):
        try:
            difference = _compare(run, fold, make_step, run_rule, precise)
            return difference or _compare(run, fold, _Opened, run_cut, precise, grown)
        except PlainError:
            if not precise:
                raise
        except Exception as error:  # of any kind: it is the user's code
            if isinstance(error, _MovesError):
                raise ValueError(*error.args) from None
            if _is_fault(error):
                raise
            problem = f"does not run so ({type(error).__name__}: {error})"
    return problem


@contextmanager
def apart_from_user(device: torch.device) -> Iterator[None]:
    """Leave random generators as they were, and run without the user's modes and compiled kernels."""
    with ExitStack() as stack:
        stack.enter_context(_disable_current_modes())  # which count operations, say
        stack.enter_context(kernels.without_modes())
        stack.enter_context(keep_generators(device))
        stack.enter_context(kernels.using(compile="off"))
        _seed()
        yield


def copy_apart(model: nn.Module) -> nn.Module:
    """Return a copy of a network, without what Fabric and DistributedDataParallel put around it."""
    twin = copy_model(unwrapped(model))
    for module in twin.modules():
        if is_dropout(module):
            module.eval()
    return twin


def is_dropout(module: nn.Module) -> bool:
    """Return whether a module draws masks as PyTorch does, of each sample by itself, which a copy to try leaves out."""
    ours = type(module).forward.__module__.startswith(("torch.nn.", "sltt."))
    return isinstance(module, _DropoutNd | Dropout) and ours


def _seed() -> None:
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)


def _compare(run: Run, fold: int, make_step: Any, run_rule: RunRule, precise: bool, grown: bool = False) -> str | None:
    sequence, tolerance = run.sequence, _PRECISE if precise else _ROUGH
    x, most = sequence.x if sequence.static else sequence.x[: 2 * fold], min(sequence.steps, 2 * fold)
    kind = torch.float64 if precise and x.is_floating_point() else x.dtype
    opened, watch = make_step is _Opened, None

    def results(steps: int) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return what so many steps in a call give, and what they change in the network."""
        nonlocal watch
        twin, step = copy_apart(run.model), make_step()
        twin = twin.double() if precise else twin
        _seed()
        if isinstance(step, _Opened):
            watch = watch or step.watch
            with torch.no_grad():
                for p in twin.parameters():
                    p += 0.1 * _spread(p)
        weights, layout = [(name, p, p.detach().clone()) for name, p in twin.named_parameters()], layout_of(twin)
        own = x.detach().to(kind, copy=True)  # a forward may change it
        own = (own * (2 + _spread(own)) if grown else own).requires_grad_(x.requires_grad)
        part = Sequence(own, most, sequence.static)
        with watch if watch is not None and steps == 1 else nullcontext(), kernels.using(bits=not opened):
            outcome = _run(twin, part, steps, step, run_rule)  # where operations are watched, no kernel looks at values
        outcome["the masks of dropout"] = torch.tensor(getattr(step, "masks", 0))
        changes = layout.changes()
        return outcome, changes | {name: p.detach() for name, p, before in weights if not torch.equal(p, before)}

    try:
        plain, changed = results(1)
    except Exception as error:
        if opened:  # with other weights and values, and no spikes, it need not run
            return _compare(run, fold, make_step, run_rule, precise) if grown else watch and watch.found
        if _is_fault(error):
            raise
        raise PlainError from error
    if watch is not None and watch.found:
        return watch.found
    together, also_changed = results(fold)
    for name, value in changed.items():
        if isinstance(value, Tensor) or name not in also_changed or value != also_changed[name]:
            return f"changes {name} in a time step"
    problem = _find_unequal(plain, together, tolerance)
    if problem and not opened and (moved := _find_unequal(plain, results(1)[0], tolerance)):
        raise _MovesError(
            f"the network {moved.partition(' then')[0]} when it runs again on a copy: its forward reads something "
            "outside of it that moves, such as a clock, an iterator or a generator of random numbers. Keep it in the "
            "network, or use fold=1, which runs nothing twice"
        )
    return problem


def _run(twin: nn.Module, sequence: Sequence, fold: int, step: Step, run_rule: RunRule) -> dict[str, Tensor | None]:
    """Run a rule on a copy; return logits, states, gradients and buffers by name, in the order of their importance."""
    leaves: dict[Tensor, Tensor | None] = {}  # with the gradients that they had: some are outside of the network

    def backward(value: Tensor) -> None:
        nodes = graph_nodes([value.grad_fn])
        for leaf in {node.variable for node in nodes - operations(nodes)}.difference(leaves):
            leaves[leaf], leaf.grad = leaf.grad, None
        value.backward()

    try:
        with without_marked_hooks(twin.modules()), torch.enable_grad(), Run(twin, sequence, step) as run:
            run.goes_on = True
            results: dict[str, Any] = {"the logits": run_rule(run, fold, backward)}
            run.results.finish(backward)
            for layer in run.layout.keepers:
                for name in layer.states:
                    results[f"the state {name} of {layer}"] = getattr(layer.module, name)
        for name, p in twin.named_parameters():  # one behind a long delay may have 0 in a call of several steps alone
            results[f"the gradient of {name}"] = torch.zeros_like(p) if p.grad is None else p.grad
        return results | {f"the buffer {name}": buffer for name, buffer in twin.named_buffers()}
    finally:
        for leaf, gradient in leaves.items():
            leaf.grad = gradient


def _find_unequal(first: dict[str, Any], second: dict[str, Any], tolerance: float) -> str | None:
    """Return how results differ by more than rounding, or None."""
    both = {name: (_flatten(a), _flatten(second.get(name))) for name, a in first.items()}
    gradients = [a.abs().max() for name, (a, _) in both.items() if name.startswith("the gradient") and a.numel()]
    largest = torch.stack(gradients).max() if gradients else 0.0  # beside it, a gradient that is 0 is rounding
    for name, (a, b) in both.items():
        if a.numel() == b.numel() and not a.numel():
            continue
        scale = a[a.isfinite()].abs().max() if a.isfinite().any() else 1.0
        scale = scale + largest / 100 * name.startswith("the gradient")
        same = a.shape == b.shape and ((a == b) | (a.isnan() & b.isnan()) | ((a - b).abs() <= tolerance * scale)).all()
        if not same:
            return f"differs in {name} then: it mixes samples, or keeps what no rule knows"
    return None


def _flatten(value: Any) -> Tensor:
    """Return the tensors in a result as one, in float64."""
    if isinstance(value, Tensor):
        return value.detach().flatten().to("cpu", torch.float64)
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return torch.cat([torch.zeros(0, dtype=torch.float64), *map(_flatten, parts)])


def _is_fault(error: Exception) -> bool:
    """Return whether an error is a fault of this package: raised in it, and no refusal."""
    if not isinstance(error, AttributeError | TypeError | NameError | LookupError | AssertionError):
        return False
    *_, last = traceback.extract_tb(error.__traceback__)
    return Path(last.filename).is_relative_to(Path(__file__).parents[1])
