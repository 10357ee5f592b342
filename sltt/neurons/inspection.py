"""Check that a kernel can be made of a neuron's function: pure, elementwise, and with a gradient."""

import functools
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from sltt._torch import DispatchMode
from sltt.kernels import CustomStep
from sltt.surrogates import Triangle

SHAPE = (4, 3, 5)  # samples, channels, positions
_DECIDES = (
    "decides by the value of a tensor (an if, bool(), .item(), .tolist(), .numpy() or v[v > 1])",
    "use torch.where",
)
_READ = {torch.Tensor.tolist, torch.Tensor.numpy, torch.Tensor.__array__, torch.Tensor.__dlpack__}


@functools.lru_cache(maxsize=1024)
@torch.inference_mode(False)
def emits_bits(kind: type, step: CustomStep) -> bool:
    """Check a neuron's function by running it on a few numbers; whether its spikes are those of a surrogate, 0 or 1.

    Args:
        kind: the neuron's class, for its name and those of its states.
        step: the function.

    Raises:
        ValueError: what is wrong with the function, and the remedy.
    """
    problem = functools.partial(_problem, kind)
    generator = torch.Generator("cpu").manual_seed(0)

    def draw() -> Tensor:
        return 2 * torch.randn(SHAPE, generator=generator, device="cpu")

    x, *states = inputs = [draw() for _ in range(1 + step.states)]
    shapes = ((SHAPE[1], 1) if by_channel else () for _, by_channel in step.parameters)
    parameters = [torch.rand(shape, generator=generator, device="cpu") for shape in shapes]
    with torch.enable_grad():
        leaves = [t.clone().requires_grad_().clone() for t in (*inputs, *parameters)]  # may be changed in place
        results = _run_watched(kind, step, leaves)
        of_surrogates = type(Triangle()(leaves[0]).grad_fn)
    for name, value in zip(("spikes", *kind.states), results, strict=True):
        if value.shape != x.shape or value.dtype != x.dtype:
            got = f"{list(value.shape)} ({str(value.dtype).removeprefix('torch.')})"
            raise problem(f"returns {name} {got} for an input {list(SHAPE)} (float32)", "keep shape and type")
    if not results[0].requires_grad:
        raise problem(
            "returns spikes that no gradient passes", "let a surrogate fire: sltt.surrogates.Triangle()(u - 1)"
        )
    with torch.no_grad():
        again = step(x, states, parameters)
        if not _equal_leaves(results, again):
            raise problem("is not pure: it gave another result for the same input", "keep what it remembers in a state")
        changes = torch.zeros(SHAPE, dtype=torch.bool, device="cpu")
        changes[::2, 1:, ::2] = True
        x, *states = (torch.where(changes, draw(), t) for t in inputs)
        other = step(x, states, parameters)
        if not _equal_leaves([t[~changes] for t in results], [t[~changes] for t in other]):
            raise problem(
                "mixes neurons: an input of one changes the result of another",
                "compute elementwise, and mix in a layer before the neurons",
            )
        x, *states = inputs
        for shape in _SHAPES[step.by_channel]:
            if not _equal_leaves(results, _in_shape(kind, step, shape, (x, states, parameters))):
                raise problem(*_BY_SHAPE)
    return type(results[0].grad_fn) is of_surrogates


# What a kernel makes of SHAPE: one dimension where no parameter has a value for each channel; and other inputs.
_SHAPES = {False: ((60,), (12, 5), (2, 2, 3, 5)), True: ((4, 3, 5, 1),)}
_BY_SHAPE = (
    "gives other results for the same numbers in another shape",
    "compute elementwise, without the shape or the number of dimensions of x",
)


def _in_shape(kind: type, step: CustomStep, shape: tuple[int, ...], arguments: Any) -> list[Tensor]:
    """Return the function's results where its arguments have another shape."""
    x, states, parameters = arguments
    channels = [p.view(-1, *[1] * (len(shape) - 2)) if p.ndim else p for p in parameters]
    try:
        results = step(x.view(shape), [v.view(shape) for v in states], channels)
        return [t.reshape(x.shape) for t in results]
    except Exception as error:
        raise _problem(kind, *_BY_SHAPE) from error


def _run_watched(kind: type, step: CustomStep, leaves: list[Tensor]) -> tuple[Tensor, ...]:
    """Return the function's results on `leaves`, whose operations are watched."""
    problem = functools.partial(_problem, kind)
    x, *others = leaves
    watch, results = _Watch(leaves), ()
    try:
        with watch, _Readers(watch):
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


class _Watch(DispatchMode):
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
            return _DECIDES
        if func._schema.is_mutable and storages and storages[0] in self._inputs:
            return f"changes an argument in place ({func})", "write u = v + x for v += x"
        if func is not torch.ops.aten.lift_fresh.default and not self._known.issuperset(storages):
            return (
                "reads a tensor that is none of its arguments",
                "make it an attribute of the neuron and a keyword argument of step",
            )
        return None


class _Readers(TorchFunctionMode):
    """Tells a watch of what reads memory without an operation."""

    def __init__(self, watch: _Watch):
        super().__init__()
        self.watch = watch

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _READ:
            self.watch.found = self.watch.found or _DECIDES
        return func(*args, **(kwargs or {}))


def _equal_leaves(a: Any, b: Any) -> bool:
    return all(
        torch.allclose(one, other, rtol=1e-6, atol=1e-6, equal_nan=True) for one, other in zip(a, b, strict=True)
    )


def _problem(kind: type, what: str, remedy: str) -> ValueError:
    return ValueError(f"{kind.__name__}.step {what}; {remedy}")
