"""Names of PyTorch that are not public, as read from 2.8 to 2.15; no other file has any."""

# ruff: noqa: F401
import torch

try:
    from torch._C import (  # pyright: ignore
        TensorBase,
        _are_functorch_transforms_active,
        _current_graph_task_id,
        _disabled_torch_function_impl,
        _len_torch_function_stack,
        _to_dlpack,
    )
    from torch._C._autograd import _top_saved_tensors_default_hooks  # pyright: ignore
    from torch._C._functorch import is_functorch_wrapped_tensor  # pyright: ignore
    from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
    from torch.nn.modules.dropout import _DropoutNd
    from torch.nn.modules.instancenorm import _InstanceNorm
    from torch.nn.utils.parametrizations import _SpectralNorm
    from torch.overrides import _pop_mode, _push_mode
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_map_only
except ImportError as error:
    raise ImportError(f"PyTorch {torch.__version__} lacks what PyTorch 2.8 to 2.15 have: {error}") from error


def compile_errors() -> tuple[type[Exception], ...]:
    """What `torch.compile` raises while it compiles, before anything has run."""
    from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException  # take a second to import
    from torch._inductor.exc import CppCompileError, InvalidCxxCompiler

    return TorchDynamoException, FailOnRecompileLimitHit, CppCompileError, InvalidCxxCompiler


def is_compiled(module: torch.nn.Module) -> bool:
    """Whether calls of a module run what `torch.compile` made: of it, of its forward, or by `module.compile()`."""
    names = "_orig_mod", "_torchdynamo_orig_callable"
    by_call = getattr(module, "_compiled_call_impl", None) is not None
    return by_call or any(hasattr(one, name) for one in (module, module.forward) for name in names)


def end_workers(loader: torch.utils.data.DataLoader) -> None:
    """End the processes that load a loader's data."""
    iterator, loader._iterator = loader._iterator, None
    if hasattr(iterator, "_shutdown_workers"):
        iterator._shutdown_workers()  # type: ignore[union-attr]  # pyright: ignore
