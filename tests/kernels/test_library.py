"""What is compiled on a machine, and all that can go wrong on the way to it."""

import os
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

from sltt import kernels, system
from sltt.kernels import compiling, native
from tests.conftest import LINUX
from tests.kernels.exact import NATIVE, spikes

COPY = 'while [ "$1" != -o ]; do [ "$1" = --version ] && exit; shift; done; cp "$REAL" "$2"'  # a fast compiler


def script(path, text):
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache, and a compiler that copies the library of the cache in use; nothing found is remembered."""
    monkeypatch.setenv("REAL", getattr(native.library(), "_name", ""))
    monkeypatch.setenv("CXX", script(tmp_path / "c++", COPY))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    forget()
    yield tmp_path / "sltt"
    monkeypatch.undo()
    forget()


def forget():
    for function in (native._library, native.key):
        function.cache_clear()


@NATIVE
def test_damaged_library_is_compiled_anew(cache, monkeypatch):
    assert native.library() is not None
    (path,) = cache.iterdir()
    good = path.read_bytes()
    for bad in (b"", good[:1000], good[:5000] + b"x" + good[5001:]):
        path.unlink()  # the mapped file stays as it is
        path.write_bytes(bad)
        native._library.cache_clear()
        assert native.problem() is None
        assert path.read_bytes() == good
        assert list(cache.iterdir()) == [path]
    for place in (cache, path):  # as one that somebody else put there
        place.chmod(0o777)
        path.write_bytes(good)
        before = path.stat().st_ino
        native._library.cache_clear()
        assert native.problem() is None
        assert path.stat().st_ino != before
        assert not any(one.stat().st_mode & 0o022 for one in (cache, path))
    os.chown(cache, 4321, -1) if os.getuid() == 0 else monkeypatch.setattr(native.os, "getuid", lambda: 4321)
    native._library.cache_clear()
    with pytest.warns(UserWarning, match="sltt is another user's: set XDG_CACHE_HOME"):
        assert native.library() is None


def test_an_unknown_processor_without_proc_is_silent(cache, monkeypatch):
    monkeypatch.setattr(system, "Path", lambda path: Path("nowhere") / path.lstrip("/"))
    assert native.problem().startswith("the processor is not known: ")


@pytest.mark.parametrize(
    ("platform", "machine", "file"),
    [("win32", "AMD64", "x86-64-v4"), ("darwin", "arm64", "aarch64"), ("darwin", "x86_64", None), ("win32", "x", None)],
)
def test_other_systems_take_the_kernels_of_a_wheel_or_none(platform, machine, file, cache, monkeypatch):
    """Without /proc, user ids and a compiler, whatever CXX says."""
    monkeypatch.setattr(native.sys, "platform", platform)
    monkeypatch.setattr(native.platform, "machine", lambda: machine)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    monkeypatch.setattr(system, "read_processor", None)
    monkeypatch.delattr(os, "getuid")
    monkeypatch.setattr(native, "SHIPPED", cache.with_name("shipped"))
    assert native.problem() == f"no kernels are compiled on {platform}, {machine}: wheels may have some"
    assert not native.has_amx.__wrapped__()
    if file:
        native.SHIPPED.mkdir()
        shutil.copy(os.environ["REAL"], native.SHIPPED / compiling.shipped_name(file))
        native._library.cache_clear()
        assert native.library() is not None
        assert native.origin() == f"shipped for {file}"


def test_library_is_keyed_by_instruction_set_and_compiler(cache, tmp_path, monkeypatch):
    keys = set()
    for name, text in {"a": "echo 1", "b": "echo 2"}.items():
        monkeypatch.setenv("CXX", script(tmp_path / name, text))
        for capability in ("AVX512", "AVX2", "DEFAULT"):
            monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda c=capability: c)
            native.key.cache_clear()
            keys.add(native.key())
    assert len(keys) == 6


def test_compiler_that_fails(cache, tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", script(tmp_path / "c++", "[ $1 = --version ] || { echo 'error: no'; exit 1; } 1>&2"))
    with pytest.warns(UserWarning, match="compiling the kernels failed: error: no"):
        assert native.library() is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert native.problem() == "compiling the kernels failed: error: no"  # and no second warning
    assert list(cache.iterdir()) == []
    conv, x = nn.Conv2d(16, 16, 3), spikes((2, 16, 16, 16), 0.5)

    def call():
        with kernels.using(sparse="on"):
            return kernels.spike_call(kernels.operation_of(conv), x, conv.weight, conv.bias, kernels.WeightCache())

    assert call() is None  # runs dense
    monkeypatch.undo()
    forget()
    assert (call() is None) == (native.problem() is not None)


def test_compiler_that_gives_something_else(cache, tmp_path, monkeypatch):
    text = 'while [ "$1" != -o ]; do [ "$1" = --version ] && exit; shift; done; echo no library > "$2"'
    monkeypatch.setenv("CXX", script(tmp_path / "c++", text))
    with pytest.warns(UserWarning, match="cannot be loaded"):
        assert native.library() is None


def test_no_compiler_is_silent(cache, monkeypatch):
    monkeypatch.setattr(native.shutil, "which", lambda _: None)
    assert native.problem() == "there is no C++ compiler (apt install g++)"


FORKS = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")


def fork_and(is_right):
    """A process that ends with 0 if is_right() is true; it has all that is imported already."""
    if child := os.fork():
        return child
    try:
        os._exit(not is_right())
    finally:
        os._exit(1)


def succeeds(child):
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_cache_that_cannot_be_made(cache):
    cache.write_text("a file where the folder should be")
    with pytest.warns(UserWarning, match="cannot be written"):
        assert native.library() is None


@NATIVE
@LINUX
@FORKS
def test_two_processes_compile_at_once(cache, tmp_path, monkeypatch):
    """Both compilers are at work before either has written; neither process sees half a file of the other."""
    (tmp_path / "at work").mkdir()
    wait = f"""cd '{tmp_path}/at work'; touch $$; while [ $(ls | wc -l) -lt 2 ]; do sleep 0.01; done"""
    monkeypatch.setenv("CXX", script(tmp_path / "c++", COPY.replace("done; cp", f"done; {wait}; cp")))
    children = [fork_and(lambda: native.library() is not None) for _ in range(2)]
    assert [succeeds(child) for child in children] == [True, True]
    assert [compiling.is_intact(path) for path in cache.iterdir()] == [True]
