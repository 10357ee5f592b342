"""CUDA graphs of training batches: one launch for the forward and backward of all time steps.

A graph repeats what the device did: kernels, on tensors in fixed memory. It does not repeat what Python did. So three
batches run as they are, and the second of them is watched for what a graph would not repeat.
"""

import random
import warnings
from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sltt._torch import DispatchMode, get_rng_states, keep_generators, set_rng_states, tree_leaves
from sltt.checks import instance
from sltt.rules import Output, Rule
from sltt.rules.base import StepLoss
from sltt.sequence.fingerprint import Fingerprint
from sltt.sequence.hooks import count_hooks
from sltt.sequence.layout import Layout
from sltt.sequence.padding import Padded
from sltt.training.session import Session
from sltt.training.settings import Settings

EAGER = 3  # batches before the capture; they compile kernels, and make what is made once
_WATCHED = 2  # the one of them that is watched
Iteration = Callable[[Tensor, Tensor], Any]


class CudaGraph:
    """A CUDA graph of one function, and the stream on which it is captured.

    One `beside` another shares the memory of its intermediate results: they never run at once.
    """

    def __init__(self, device: torch.device, beside: "CudaGraph | None" = None):
        self._device, self._graph = device, torch.cuda.CUDAGraph()
        self._stream = beside._stream if beside else torch.cuda.Stream(device)
        self._pool = beside._pool if beside else torch.cuda.graph_pool_handle()

    @staticmethod
    def runs_on(device: torch.device) -> bool:
        """Return whether a device has graphs."""
        return device.type == "cuda"

    def warm(self, function: Callable[[], Any]) -> Any:
        """Run the function on the stream of the capture, in the order of the current stream."""
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            result = function()
        current.wait_stream(self._stream)
        return result

    def capture(self, function: Callable[[], Any]) -> Any:
        """Record what the function launches; return its result, in memory that `replay` writes."""
        # not "global": the thread in which a data loader pins memory calls CUDA at any time
        how: Any = {"pool": self._pool, "stream": self._stream, "capture_error_mode": "thread_local"}
        generator = torch.cuda.default_generators[self._device.index or 0]
        state = generator.clone_state()
        try:
            with torch.cuda.graph(self._graph, **how):
                return function()
        except BaseException:
            generator.graphsafe_set_state(state)  # a capture that fails leaves a state that draws nothing any more
            raise

    def replay(self) -> None:
        """Launch what was recorded."""
        self._graph.replay()


class Replay:
    """An iteration as a graph that has run it before. It reads copies of x and y, and leaves gradients in `.grad`.

    One `beside` another, of the same shapes, shares inputs and gradients with it.
    """

    def __init__(
        self,
        graph: Any,
        iteration: Iteration,
        parameters: Iterable[nn.Parameter],
        x: Tensor,
        y: Tensor,
        beside: "Replay | None" = None,
    ):
        self.x, self.y, self._graph = (beside.x, beside.y, graph) if beside else (x.clone(), y.clone(), graph)
        shared = {p: gradient for p, gradient in beside._gradients if gradient is not None} if beside else {}
        parameters = list(parameters)
        for p in parameters:  # else the graph makes gradients of its own, and writes them in each replay
            p.grad = shared.get(p)

        def run() -> Any:
            for gradient in shared.values():
                gradient.zero_()
            return iteration(self.x, self.y)

        try:
            self._result = graph.capture(run)
        except Exception as error:
            error.add_note("in the capture of a training batch as a CUDA graph: train without, by graph='off'")
            raise
        self._gradients = [(p, p.grad) for p in parameters]

    def __call__(self, x: Tensor, y: Tensor) -> Any:
        """Run the iteration on other inputs; its result and the gradients are overwritten by the next call."""
        self.x.copy_(x, non_blocking=True)
        self.y.copy_(y, non_blocking=True)
        self._graph.replay()
        for p, gradient in self._gradients:
            p.grad = gradient
        return self._result


class Graphs:
    """Runs the batches of a phase: three of a shape as they are, and from the fourth on as a graph.

    What a rule draws has a graph of its own, after a batch that runs as it is. `problem` is why batches run as they
    are, where they do. A capture that fails is an error if graphs are `demanded`, and a problem if not.
    """

    def __init__(self, model: nn.Module, device: torch.device, problem: str | None = None, demanded: bool = True):
        self.model, self.device, self.problem, self.demanded = model, device, problem, demanded
        self._form: Any = None
        self._graph: Any = None

    def __call__(self, iteration: Iteration, x: Tensor, y: Tensor | Padded, drawn: Hashable = None) -> Any:
        """Run an iteration, from `.grad` that is None; those of one draw do the same on other inputs."""
        if isinstance(y, Padded):
            self.problem = "sequences have several lengths"
        if self.problem or isinstance(y, Padded):
            return iteration(x, y)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
        form = [(tensor.shape, tensor.dtype, tensor.stride()) for tensor in (x, y)]
        if form != self._form:
            self._form, self._ran, self._graph = form, 0, CudaGraph(self.device)
            self._replays: dict[Hashable, Replay | None] = {}
        self._ran += 1
        if self._ran <= EAGER or drawn not in self._replays:
            self._replays[drawn] = None
            run = partial(self._graph.warm, partial(iteration, x, y))
            if self._ran != _WATCHED:
                return run()
            result, self.problem = watch(self.model, run, self.device)
            return result
        if self._replays[drawn] is None and not self._capture(iteration, x, y, drawn):
            return iteration(x, y)
        return self._replays[drawn](x, y)  # type: ignore[misc]  # pyright: ignore[reportOptionalCall]

    def _capture(self, iteration: Iteration, x: Tensor, y: Tensor, drawn: Hashable) -> bool:
        """Make the graph of a draw; return whether it was made, if it is not demanded."""
        first, state = next(filter(None, self._replays.values()), None), get_rng_states()
        graph, parameters = CudaGraph(self.device, self._graph) if first else self._graph, [*self.model.parameters()]
        try:
            self._replays[drawn] = Replay(graph, iteration, parameters, x, y, first)
            return True
        except Exception as error:
            if self.demanded:
                raise
            while error.__context__ is not None:  # where an error ends a capture, its end raises another one
                error = error.__context__  # type: ignore[assignment]
            self.problem = f"its capture failed ({type(error).__name__}: {str(error).partition(chr(10))[0]})"
        self._graph, self._replays = None, {}
        set_rng_states(state)
        for p in parameters:
            p.grad = None
        return False


def graphed(
    rule: Rule, model: nn.Module, loss: StepLoss, x: Tensor, y: Tensor, *, steps: int | None = None
) -> Callable[[Tensor, Tensor], Output]:
    """Return a function that runs batches on a GPU as one CUDA graph: `rule(model, x, y, loss)` in one launch.

        step = sltt.graphed(rule, model, loss, x, y)
        for x, y in loader:     # on the GPU or the CPU; DataLoader(…, drop_last=True)
            out = step(x, y)
            optimizer.step()

    The function writes gradients anew, so `zero_grad` is not needed. Call it in the mode of the model that it was
    captured in. Weights, running statistics and random generators are as before: x and y train nothing. Inside
    `torch.autocast` the graph is one in mixed precision, and later calls need no context. It keeps its memory.

    Args:
        rule: the learning rule.
        model: on the GPU, in training mode.
        loss: of one time step, as of the rule.
        x: a batch on the GPU, time first [T, B, ...]; or, with `steps`, [B, ...]. All batches have its shape.
        y: its targets, likewise.
        steps: T for a static input.

    Raises ValueError for x outside of a GPU, what a graph cannot repeat, and, when called, another shape.
    """
    for name, tensor in (("x", x), ("y", y)):
        instance(name, tensor, Tensor)
        if not CudaGraph.runs_on(tensor.device):
            raise ValueError(f"a CUDA graph needs {name} on a CUDA device, got {tensor.device}: call the rule itself")
    length = len(x) if steps is None else steps
    problem = rule_problem(rule, length)
    if problem is None and rule.draw(length, 0) is not None:
        problem = f"{rule} draws its steps anew for each batch"
    batches, parameters = Graphs(model, x.device, problem), list(model.parameters())

    def iteration(x: Tensor, y: Tensor) -> Output:
        torch.clear_autocast_cache()  # casts of weights are made anew in each replay
        try:
            return rule(model, x, y, loss, steps=steps)
        finally:
            torch.clear_autocast_cache()

    gradients = [p.grad for p in parameters]
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    with keep_generators(x.device):
        for _ in range(EAGER):
            if not batches.problem:
                for p in parameters:
                    p.grad = None
                batches(iteration, x, y)
    if batches.problem:
        raise ValueError(f"a CUDA graph does not repeat a batch, since {batches.problem}: call the rule itself")
    with torch.no_grad():
        for buffer, before in buffers:
            buffer.copy_(before)
    replay = Replay(batches._graph, iteration, parameters, x, y)
    for p, gradient in zip(parameters, gradients, strict=True):
        p.grad = gradient

    def step(x: Tensor, y: Tensor) -> Output:
        for name, sample, captured in (("x", x, replay.x), ("y", y, replay.y)):
            if sample.shape != captured.shape:
                remedy = "use DataLoader(…, drop_last=True), or the rule itself"
                raise ValueError(f"the graph takes {name} {[*captured.shape]}, got {[*sample.shape]}: {remedy}")
        return Output(*(value.clone() for value in replay(x, y)))

    return step


def make_graphs(here: Session, settings: Settings, rule: Rule, steps: int) -> Graphs | None:
    """Return what runs the batches of a phase; None where nobody wants graphs."""
    mode, device, model = settings.graph, here.fabric.device, settings.model
    if mode == "off" or not CudaGraph.runs_on(device):
        return None
    problem, several = rule_problem(rule, steps), here.processes.count > 1
    if settings.precision == "16-mixed":
        problem = problem or "16-mixed scales the loss anew for each batch: use bf16-mixed"
    if several and any(isinstance(m, nn.SyncBatchNorm) for m in model.modules()):
        problem = problem or "processes exchange tensors within a batch"
    if mode == "auto" and not problem:
        kinds = [type(part) for part in (rule, *(settings.callbacks or ()))]
        own = next((kind.__name__ for kind in kinds if not kind.__module__.startswith("sltt.")), None)
        problem = f"{own} may do what a graph does not repeat (graph='on' if not)" if own else model_problem(model)
    return Graphs(model, device, problem, mode == "on")


def rule_problem(rule: Rule, steps: int) -> str | None:
    """Return why graphs cannot repeat batches of a rule; None if they can."""
    problem = rule.no_graph(steps)
    return f"{rule} {problem}" if problem else None


def model_problem(model: nn.Module) -> str | None:
    """Return what a network runs beside kernels, in hooks and compiled code; None if there is nothing."""
    for layer in Layout(model).layers.values():
        if count_hooks(layer.module):
            return f"{layer} has hooks, which it would not call"
        if layer.compiled:
            return f"{layer} has compiled code, which may be a graph already"
    return None


def watch(model: nn.Module, run: Callable[[], Any], device: torch.device) -> tuple[Any, str | None]:
    """Run a batch on a device; return its result, and why a graph would not repeat it."""
    before, drawn = Fingerprint(Layout(model).layers.values(), device), _draws()
    with _HostTraffic() as traffic, _waits(device) as places:
        result = run()
    problem = traffic.problem or (f"a batch waits for the device in {places[0]}" if places else None)
    if _draws() != drawn:
        problem = "a batch draws random numbers of Python or NumPy"
    changed = next(iter(before.changes()), None)
    return result, f"a batch changes {changed}" if changed else problem


@contextmanager
def _waits(device: torch.device) -> Iterator[list[str]]:
    """List the lines of Python in which the host waits for a CUDA device."""
    lines: list[str] = []
    if device.type != "cuda":
        yield lines
        return
    mode = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield lines
        finally:
            torch.cuda.set_sync_debug_mode(mode)
    for warning in caught:
        if "called a synchronizing CUDA operation" in str(warning.message):
            lines.append(f"{warning.filename}:{warning.lineno}")
        elif "Synchronization debug mode" not in str(warning.message):
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)


class _HostTraffic(DispatchMode):
    """Sees operations that wait for the device or take data from the host; `problem` names one."""

    problem: str | None = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, func.overloadpacket.__name__
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        devices = {torch.device(d).type for d in (*(t.device for t in tensors), kwargs.get("device")) if d is not None}
        by_number = name == "index" and all(t.dtype != torch.bool for t in tensors[1:])
        reads = torch.Tag.data_dependent_output in func.tags or torch.Tag.dynamic_output_shape in func.tags
        if name == "index_put_" and tensors[-1].numel() > 1:  # one value fills what is masked, and reads no mask
            reads = any(t.dtype == torch.bool for t in tensors[1:-1])
        reads |= name == "_linalg_check_errors"
        copies = name == "lift_fresh" or (name in ("_to_copy", "copy_") and len(devices) > 1)
        if devices != {"cpu"} and copies:
            self.problem = f"a batch copies a tensor from the host or to it ({name})"
        elif devices != {"cpu"} and reads and not by_number:
            self.problem = f"a batch reads values of a tensor ({name})"
        return func(*args, **kwargs)


def _draws() -> Any:
    """Return the states of generators that no graph knows; PyTorch's own on the host would show by a copy."""
    state: Any = np.random.get_state()
    return random.getstate(), state[1].tobytes(), state[2]
