"""Check that a kernel can be made of a neuron's function: pure, elementwise, and with a gradient."""

import functools
from typing import Any

import torch
from torch import Tensor

from sltt._torch import DispatchMode
from sltt.kernels import CustomStep
from sltt.surrogates import Triangle

SHAPE = (4, 3, 5)  # samples, channels, positions


@functools.lru_cache(maxsize=1024)
@torch.inference_mode(False)
def emits_bits(kind: type, step: CustomStep) -> bool:
    """Check a neuron's function by running it on a few numbers; whether its spikes are those of a surrogate, 0 or 1.

    Args:
        kind: the neuron's class, for its name and those of its states.
        step: the function.

    Raises ValueError naming what is wrong with the function, and the remedy.
    """
    problem = functools.partial(_problem, kind)
    generator = torch.Generator("cpu").manual_seed(0)
    inputs = [2 * torch.randn(SHAPE, generator=generator, device="cpu") for _ in range(1 + step.states)]
    shapes = ((SHAPE[1], 1) if by_channel else () for _, by_channel in step.parameters)
    parameters = [torch.rand(shape, generator=generator, device="cpu") for shape in shapes]
    with torch.enable_grad():
        leaves = [t.clone().requires_grad_().clone() for t in (*inputs, *parameters)]  # may be changed in place
        results = _run_watched(kind, step, leaves)
        of_surrogates = type(Triangle()(leaves[0]).grad_fn)
    for name, value in zip(("spikes", *kind.states), results, strict=True):
        if value.shape != SHAPE or value.dtype != inputs[0].dtype:
            got = f"{list(value.shape)} ({str(value.dtype).removeprefix('torch.')})"
            raise problem(f"returns {name} {got} for an input {list(SHAPE)} (float32)", "keep shape and type")
    if not results[0].requires_grad:
        remedy = "let a surrogate fire: sltt.surrogates.Triangle()(u - 1)"
        raise problem("returns spikes that no gradient passes", remedy)
    same, cause = False, None
    try:
        alone = _run_alone(step, inputs, parameters)
        same = all(torch.allclose(*both, 1e-5, 1e-5, equal_nan=True) for both in zip(results, alone, strict=True))
    except Exception as error:
        cause = error
    if not same:
        remedy = "compute it without the shape of x; mix neurons in a layer before; keep what step remembers in a state"
        raise problem("gives a neuron another result alone than among others", remedy) from cause
    return type(results[0].grad_fn) is of_surrogates


@torch.no_grad()
def _run_alone(step: CustomStep, inputs: list[Tensor], parameters: list[Tensor]) -> list[Tensor]:
    """Return the function's results where it is called for one neuron after the other."""
    shape, results = (1,) * (3 if step.by_channel else 1), []
    for values in zip(*(t.expand(SHAPE).flatten() for t in (*inputs, *parameters)), strict=True):
        x, *others = (value.view(shape) for value in values)
        results.append(step(x, others[: step.states], others[step.states :]))
    return [torch.cat(of_neurons).view(SHAPE) for of_neurons in zip(*results, strict=True)]


def _run_watched(kind: type, step: CustomStep, leaves: list[Tensor]) -> tuple[Tensor, ...]:
    """Return the function's results on `leaves`, whose operations are watched."""
    problem = functools.partial(_problem, kind)
    x, *others = leaves
    watch, results = _StepOperations(leaves), ()
    try:
        with watch:
            results = step(x, others[: step.states], others[step.states :])
    except Exception as error:
        if watch.found is None:
            error.add_note(
                f"in {kind.__name__}.step, on an input {list(SHAPE)} and states of that shape; it takes all values at "
                "once: write torch.where(u > 1, a, b) for `a if u > 1 else b`"
            )
            raise
    if watch.found is not None:
        raise problem(*watch.found)
    if len(results) != 1 + step.states or not all(isinstance(value, Tensor) for value in results):
        expected = ", ".join(("spikes", *kind.states))
        raise problem(f"returns {len(results)} value{'s' * (len(results) != 1)}", f"return ({expected}), each a tensor")
    return results


class _StepOperations(DispatchMode):
    """Looks at the operations of a function; `found` is what is wrong with one, and the remedy."""

    def __init__(self, inputs: list[Tensor]):
        super().__init__()
        self.found: tuple[str, str] | None = None
        self._inputs = {t.untyped_storage()._cdata for t in inputs}
        self._known = set(self._inputs)
        self._alive: list[Tensor] = []  # so that no memory is used twice

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.found = self.found or self._problem_of(func, [a for a in args if isinstance(a, Tensor)])
        result = func(*args, **(kwargs or {}))
        for t in result if isinstance(result, list | tuple) else [result]:
            if isinstance(t, Tensor):
                self._alive.append(t)
                self._known.add(t.untyped_storage()._cdata)
        return result

    def _problem_of(self, func: Any, tensors: list[Tensor]) -> tuple[str, str] | None:
        storages = [t.untyped_storage()._cdata for t in tensors]
        if torch.Tag.nondeterministic_seeded in func.tags:
            return f"draws random numbers ({func})", "draw them in a layer before the neurons"
        if torch.Tag.data_dependent_output in func.tags or torch.Tag.dynamic_output_shape in func.tags:
            return "decides by the value of a tensor (an if, bool(), .item() or v[v > 1])", "use torch.where"
        if func._schema.is_mutable and storages and storages[0] in self._inputs:
            return f"changes an argument in place ({func})", "write u = v + x for v += x"
        if func is not torch.ops.aten.lift_fresh.default and not self._known.issuperset(storages):
            remedy = "make it an attribute of the neuron and a keyword argument of step"
            return "reads a tensor that is none of its arguments", remedy
        return None


def _problem(kind: type, what: str, remedy: str) -> ValueError:
    return ValueError(f"{kind.__name__}.step {what}; {remedy}")
