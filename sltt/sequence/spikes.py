"""Show spikes to observers, by forward hooks of the layers of neurons."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from sltt.sequence.claims import run_of
from sltt.sequence.hooks import keep_hooks

See = TypeVar("See", bound=Callable[..., None])


@contextmanager
def observe_spikes(layers: Mapping[str, nn.Module], see: See) -> Iterator[See]:
    """Show spikes inside this block: `see(name, spikes)` gets [n·B, ...] of n steps of a layer, in its graph.

    One that counts, with an attribute `counts`, also takes a number of spikes, and of how many there could be.
    """
    try:
        with keep_hooks(*(module.register_forward_hook(Watch(name, see)) for name, module in layers.items())):
            _count(layers.values())
            yield see
    finally:
        _count(layers.values())


def _count(layers: Iterable[nn.Module]) -> None:
    """Write down how many watch: a number that compiled code looks at, as it does not at hooks."""
    for module in layers:
        module.watched = len(watches(module))  # pyright: ignore[reportArgumentType]


class Watch:
    """A forward hook that shows spikes; not those that stand for others, as the rates of `RateBased` do."""

    sees_folds = True  # it takes several time steps in a call

    def __init__(self, name: str, see: Callable[..., None]):
        self.name, self.see = name, see

    def __call__(self, module: nn.Module, inputs: Any, output: Any) -> None:
        if torch.compiler.is_compiling():  # compiled code does not look for new hooks: its neurons look at `watched`
            return
        if (run := run_of(module)) is None or run.counts_spikes:
            self.see(self.name, spikes_of(output))

    @property
    def counts(self) -> bool:
        """Return whether a number of spikes is enough."""
        return getattr(self.see, "counts", False)

    def __reduce__(self) -> Any:
        return Watch, (self.name, _ignore)  # copies of a network are not observed


def _ignore(*_: Any) -> None:
    pass


def watches(module: nn.Module) -> list[Watch]:
    """Return those who see the spikes of a layer of neurons."""
    return [hook for hook in module._forward_hooks.values() if isinstance(hook, Watch)]


def show(module: nn.Module, spikes: Tensor) -> None:
    """Show spikes of a layer to those who see them."""
    for watch in watches(module):
        watch.see(watch.name, spikes)


def spikes_of(output: Any) -> Tensor:
    """Return the spikes in what a layer of neurons gives; layers of other libraries give their state too."""
    return output[0] if isinstance(output, tuple) else output
