"""Who sees spikes: neurons show them to observers, as they make them."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial, wraps
from typing import Any, TypeVar

from torch import Tensor, nn

from sltt.sequence.hooks import replaced
from sltt.sequence.state import OBSERVERS, emits_spikes

Observer = TypeVar("Observer", bound=Callable[[str, Tensor], None])


def spiking_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The layers of neurons of a model, ours and other libraries', by name."""
    return {name: module for name, module in model.named_modules() if emits_spikes(module)}


@contextmanager
def observing(layers: Mapping[str, nn.Module], see: Observer) -> Iterator[Observer]:
    """Inside this block, `see(name, spikes)` gets what layers of neurons make: [n·B, ...] for n steps, in its graph."""
    with ExitStack() as stack:
        for name, module in layers.items():
            if hasattr(type(module).forward, "_sltt_shows"):
                stack.enter_context(replaced(OBSERVERS, {module: (*observers(module), partial(see, name))}))
            else:
                hook = module.register_forward_hook(lambda *call, name=name: see(name, first(call[-1])))
                stack.callback(hook.remove)
        yield see


def observers(module: nn.Module) -> tuple[Callable[[Tensor], None], ...]:
    """Those who see the spikes of a layer of neurons."""
    return getattr(module, OBSERVERS, ())


def counters(module: nn.Module) -> tuple[Callable[..., None], ...]:
    """The observers that count: they also take a number of spikes, and how many there could be.

    They have an attribute `counts`, which is true.
    """
    return tuple(see for see in observers(module) if getattr(getattr(see, "func", see), "counts", False))


def show(module: nn.Module, spikes: Tensor) -> None:
    """Show spikes that a layer of neurons made to its observers."""
    for see in observers(module):
        see(spikes)


def showing(forward: Callable[[Any, Tensor], Tensor]) -> Callable[[Any, Tensor], Tensor]:
    """The forward of a layer of neurons, which shows its spikes; without it, `observing` needs a hook."""

    @wraps(forward)
    def shown(self: Any, x: Tensor) -> Tensor:
        spikes = forward(self, x)
        show(self, spikes)
        return spikes

    shown._sltt_shows = True  # type: ignore[attr-defined]
    return shown


def first(output: Any) -> Tensor:
    """The spikes in what a layer of neurons gives; layers of other libraries give their state too."""
    return output[0] if isinstance(output, tuple) else output
