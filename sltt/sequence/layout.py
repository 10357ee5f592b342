"""The layers of a network, each in its role; read again where something that they rest on has changed."""

import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parameter import is_lazy

from sltt._torch import FABRIC, is_compiled
from sltt.sequence.fingerprint import Fingerprint
from sltt.sequence.hooks import own_forward
from sltt.sequence.proof import find_unproved
from sltt.sequence.state import Role, Stateful, detach_module, role_of, state_tensors


@dataclass(eq=False, slots=True)
class Layer:
    """A module in its role."""

    name: str
    module: Any
    role: Role
    states: tuple[str, ...]  # the attributes that hold tensors between time steps
    compiled: bool  # it runs in compiled code
    parts: list[nn.Module] = field(default_factory=list)  # the modules in it that keep a state, itself included
    before: Any = None  # the forward that the instance had before a run; None is that of its class
    plain: Any = None  # the forward that the run's handler stands for
    advance: Any = None  # runs several time steps in a call, see `Role`; None where the layer cannot
    last_call: int = 0  # the call of the network in which it ran last
    is_known: bool = field(init=False)  # its forward is that of the class that has the role
    spikes: bool = field(init=False)  # it is a layer of neurons
    detach: Callable[[], Any] = field(init=False)  # drops the graph behind its states

    def __post_init__(self) -> None:
        self.is_known = self.role.of is not None and not own_forward(self.module, self.role.of)
        self.spikes = bool(self.states or self.role.kind == "keeper") and self.role.spikes(self.module)
        self.detach = self.module.detach if isinstance(self.module, Stateful) else partial(detach_module, self.module)

    @property
    def differentiable(self) -> bool:
        """Return whether a gradient flows through its states."""
        return bool(self.states) and getattr(self.module, "differentiable", True)

    def __str__(self) -> str:
        return f"{self.name or 'the model'} ({type(self.module).__name__})"


@dataclass(slots=True)
class KnownBatch:
    """Record what operations or a trial have shown of batches of one kind."""

    folds: dict[Any, Any] = field(default_factory=dict)  # time steps in a call, as chosen so far
    tried: int | None = None  # most time steps that a trial showed to share a call
    pairs: dict[nn.Module, Layer] = field(default_factory=dict)  # the layers of neurons that alone read a BatchNorm
    channels_last: bool = False  # images may have their channels last


class Layout:
    """The layers of a network."""

    def __init__(self, model: nn.Module):
        compiled = {m for outer in model.modules() if is_compiled(outer) for m in outer.modules()}
        self.layers: dict[nn.Module, Layer] = {}  # of all modules, in the order of `model.modules()`
        for name, module in model.named_modules():
            role = role_of(type(module))
            name = name.removeprefix(FABRIC).removesuffix(FABRIC[:-1])
            self.layers[module] = Layer(name, module, role, tuple(role.states(module)), module in compiled)
        self.keepers = [layer for layer in self.layers.values() if layer.states]  # those that keep a state
        for layer in self.keepers:
            layer.parts = [m for m in layer.module.modules() if self.layers[m].states]
        self.unproved = find_unproved(self.layers)  # why structure does not prove that samples are treated alike
        # no call of the network changes its weights: structure proves it, or a real batch showed it
        self.steady = self.unproved is None
        # waits for the gradients of all weights in the backward of each step
        self.distributed = any(isinstance(m, DistributedDataParallel) for m in self.layers)
        self.lazy = any(map(is_lazy, model.parameters()))  # it has no weights before its first batch
        self.looked = "hooks on" in (self.unproved or "")  # an evaluation looked for that
        convolutions = (m for m in self.layers if isinstance(m, nn.Conv1d | nn.Conv2d))
        self.pixels = {len(m.stride) for m in convolutions}  # axes beside batch and channels in what they read
        self.batches: dict[Any, KnownBatch] = {}  # by the kind of a batch
        self.chosen: Any = None  # time steps in a call of the last batch
        self.refused: str | None = None  # why no steps share a call, as a trial found
        self.in_use = False  # a run has it
        self.ran = False  # a run has ended, and warned of what modules keep
        self.reused = False  # a second batch had it, since nothing had changed
        self._fingerprint = Fingerprint(self.layers.values())
        self._changes = 0

    def changes(self) -> dict[str, Any]:
        """Return what has changed of what the forward rests on, such as an attribute."""
        return self._fingerprint.changes()

    def follow(self, before: "Layout", changes: Iterable[str]) -> None:
        """Take over from the layout before a change: no trial is repeated in vain."""
        if [*before.layers] == [*self.layers]:
            self.refused, self._changes = before.refused, 0 if before.reused else before._changes + 1
            if self._changes > _CHANGES:
                self.refused = f"changes {next(iter(changes))} from batch to batch"

    @property
    def neurons(self) -> dict[str, nn.Module]:
        """The layers of neurons by name, ours and other libraries'."""
        return {layer.name: layer.module for layer in self.layers.values() if layer.spikes}

    def check(self, batch: int) -> None:
        """Check that a rule can run the network one time step in a call; warn if it keeps no state at all.

        Raises ValueError naming every module that takes several time steps in a call, or whose state is out of reach.
        """
        kept = {inner for keeper in self.keepers for child in keeper.module.children() for inner in child.modules()}
        asked = [(layer, layer.role.check) for layer in self.layers.values() if layer.role.check]
        answers = [(layer, check(layer.module, batch, layer.module in kept)) for layer, check in asked]
        if problems := [f"{layer} {problem}" for layer, problem in answers if problem]:
            raise ValueError("a rule runs one time step in a call of the model, but " + "; ".join(problems))
        if not self.keepers:
            warnings.warn(
                "no module of the model keeps a state between time steps, so that all rules are the same. A rule knows "
                "sltt's neurons and every sltt.Stateful, the neurons of SpikingJelly, snnTorch, sinabs and Norse, and "
                "what sltt.register is given",
                stacklevel=1,  # of one line, so that it is shown once
            )

    @property
    def fold_problem(self) -> str | None:
        """Return what names every layer that cannot take several time steps in a call: now, also by its class."""
        answers = [(layer, layer.role.folds(layer.module)) for layer in self.layers.values() if layer.role.folds]
        answers += [(layer, "runs in compiled code") for layer in self.keepers if layer.compiled]
        problems = "; ".join(f"{layer} {problem}" for layer, problem in answers if problem)
        return f"fold needs layers that treat time steps alike, but {problems}; use fold=1" if problems else None

    def find_unseen(self) -> str | None:
        """Return what is wrong where neurons ran that PyTorch does not see: those in a plain list of a module."""
        for layer, key, module in self.unseen():
            if state_tensors(module):
                return (
                    f"{layer} keeps {type(module).__name__} in a plain list `.{key}`, where PyTorch does not see it, "
                    "and no rule resets it: use nn.ModuleList or nn.ModuleDict"
                )
        return None

    def unseen(self) -> Iterator[tuple[Layer, str, nn.Module]]:
        """Yield the modules in plain lists and dictionaries of a layer: the layer, its attribute, the module."""
        for layer in self.layers.values():
            if type(layer.module).__module__.partition(".")[0] not in ("torch", "sltt"):
                for key, value in vars(layer.module).items():
                    if key in _OF_MODULES or not isinstance(value, nn.Module | list | tuple | dict):
                        continue
                    modules = (inner for module in _modules_in(value) for inner in module.modules())
                    yield from ((layer, key, module) for module in modules if module not in self.layers)

    def state_tensors(self) -> list[Tensor]:
        """Return the tensors in all states, in an order that is the same wherever a time step ends."""
        return [tensor for layer in self.keepers for tensor in state_tensors(layer.module)]


_OF_MODULES = {*vars(nn.Module())}  # attributes of all modules
_KEPT = "_sltt_layouts"  # the attribute of a network with its layouts
_CHANGES = 3  # batches in a row before each of which the network changed


class _Layouts(dict[Any, Layout]):
    """The layouts of a network, in training mode and not. Deep copies and files of the network have none."""

    def __reduce__(self) -> Any:
        return dict, ()

    def __deepcopy__(self, memo: Any) -> Any:
        return _Layouts()


def layout_of(model: nn.Module) -> Layout:
    """Return the layout of a network for a run, as it was read before if nothing has changed."""
    layouts = vars(model).get(_KEPT)
    if not isinstance(layouts, _Layouts):
        layouts = vars(model)[_KEPT] = _Layouts()
    before = layouts.get(key := (model, model.training))  # a shallow copy shares the dictionary
    if before is not None and before.in_use:
        return Layout(model)
    changes = {} if before is None else before.changes()
    if before is not None and not changes:
        before.reused = True
    else:
        layouts[key] = Layout(model)
        if before is not None:
            layouts[key].follow(before, changes)
    return layouts[key]


def last_fold(model: nn.Module) -> Any:
    """Return what `folding` chose last for a network; None before its first batch, and under rules that do not fold."""
    layout = vars(model).get(_KEPT, {}).get((model, model.training))
    return layout and layout.chosen


def _modules_in(value: Any) -> list[nn.Module]:
    """Return the modules in lists and dictionaries, which begin with one."""
    if isinstance(value, nn.Module):
        return [value]
    values = list(value.values()) if isinstance(value, dict) else value
    if not isinstance(values, list | tuple) or not values or not isinstance(values[0], nn.Module | dict | list | tuple):
        return []
    return [module for item in values for module in _modules_in(item)]


def spiking_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Return the layers of neurons of a model, ours and other libraries', by name."""
    return Layout(model).neurons
