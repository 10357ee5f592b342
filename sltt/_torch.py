"""Names of PyTorch that are not public, as read from 2.6 to 2.13; tests/test_private.py says which of them is gone."""

# ruff: noqa: F401
from torch._C import _current_graph_task_id, _to_dlpack  # pyright: ignore
from torch._C._autograd import _top_saved_tensors_default_hooks  # pyright: ignore
from torch._C._functorch import is_functorch_wrapped_tensor  # pyright: ignore[reportMissingModuleSource, reportMissingImports]
from torch.overrides import _pop_mode, _push_mode


def compile_errors() -> tuple[type[Exception], ...]:
    """What `torch.compile` raises while it compiles, before anything has run."""
    from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException  # take a second to import
    from torch._inductor.exc import CppCompileError, InvalidCxxCompiler

    return TorchDynamoException, FailOnRecompileLimitHit, CppCompileError, InvalidCxxCompiler
