"""Hooks on modules for a while, and handlers in place of their forwards."""

from collections import OrderedDict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from sltt._torch import has_global_hooks


@contextmanager
def keep_hooks(*handles: RemovableHandle) -> Iterator[None]:
    """Keep hooks that were just registered inside this block; remove them at its end."""
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


_HOOKS = "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"


class Handler(partial):
    """A function in place of a layer's forward, in a run. A copy of the module, made in a run, has its own forward."""

    def __reduce__(self) -> Any:
        return getattr, (self.args[0].module, "forward")


def gradient_hooks(tensor: Any) -> list[Any]:
    """Return the hooks on a tensor, which see the gradient of one time step."""
    kinds = getattr(tensor, "_backward_hooks", None), getattr(tensor, "_post_accumulate_grad_hooks", None)
    return [hook for hooks in kinds for hook in (hooks or {}).values()]


def count_hooks(module: nn.Module) -> int:
    """Count the hooks on a module and its weights, without those that compute its weights, and those of ours."""
    hooks, values = [], vars(module)
    for name in _HOOKS:
        hooks += values[name].values()
    hooks += [hook for p in module._parameters.values() for hook in gradient_hooks(p)]
    count = len(hooks)
    for hook in hooks:
        count -= type(hook).__module__.startswith("torch.nn.utils") or hasattr(hook, "sees_folds")
    return count


@contextmanager
def without_marked_hooks(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Take those hooks off inside this block that say `sees_folds`: they are to see the time steps of batches alone."""
    before = [(module, name, vars(module)[name]) for module in modules for name in _HOOKS if vars(module)[name]]
    try:
        for module, name, hooks in before:
            kept = ((key, hook) for key, hook in hooks.items() if not hasattr(hook, "sees_folds"))
            vars(module)[name] = OrderedDict(kept)
        yield
    finally:
        for module, name, hooks in before:
            vars(module)[name] = hooks


def runs_hooks(*modules: nn.Module) -> bool:
    """Return whether calls of modules run hooks of others than those who see spikes: their own, or for all modules."""
    if has_global_hooks() or any(m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks for m in modules):
        return True
    return not all(hasattr(hook, "sees_folds") for m in modules for hook in m._forward_hooks.values())


def own_forward(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Return whether a call of a module runs more than `kind.forward`: of its class, or put there by its user."""
    inner = ("__call__", "_conv_forward") if hasattr(kind, "_conv_forward") else ("__call__",)
    if any(getattr(type(module), name) is not getattr(kind, name) for name in inner):
        return True
    forward = put_forward(module) or type(module).forward
    return getattr(forward, "__func__", forward) is not kind.forward


def put_forward(module: nn.Module) -> Any:
    """Return the forward that a user put on a module, or None."""
    forward = vars(module).get("forward")
    while isinstance(forward, Handler):
        forward = forward.args[0].before
    return forward
