"""The neuron step in Triton without a GPU: in the interpreter, compiled for GPUs, and where it is chosen."""

import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import sltt
from sltt import kernels
from sltt.kernels.neuron import step as step_of_kernels
from sltt.kernels.neuron import triton_step
from sltt.kernels.neuron.triton_step import TritonStep
from sltt.kernels.norm import normed, triton_norm

MISSING = kernels.compiler_problem(torch.device("cuda"))
TRITON = pytest.mark.skipif(MISSING is not None, reason=str(MISSING))


# numbers of time steps in a call, and whether channels are last
LAYOUTS = pytest.mark.parametrize(("steps", "last"), [(1, False), (1, True), (6, False), (6, True)])

LIF = kernels.NeuronStep(0.6, 0.8, None, False, False, sltt.surrogates.Triangle())


@TRITON
@pytest.mark.slow
@pytest.mark.timeout(900)  # half a minute on a machine that does nothing else
@pytest.mark.parametrize("norms", [False, True], ids=["neurons", "norms"])
def test_in_the_interpreter_it_equals_the_equations(norms):
    """Run them in another process, since Triton reads TRITON_INTERPRET when it is imported."""
    path, slow = Path(__file__).with_name("triton_equations.py"), "norm or each_channel or every_rule"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", "-p", "no:cacheprovider", str(path)]
    command += ["-k", slow if norms else f"not ({slow})"]
    done = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def run(n=4096, steps=1, dtype=torch.bfloat16, learned=False, device="cpu", step=LIF, rule="BPTT", state=torch.float32):
    """Run a step and its backward, where SLTT's gets no gradient of the membrane potential."""
    v = torch.zeros(n, dtype=state, device=device, requires_grad=rule == "BPTT")
    x = torch.zeros(steps * n, dtype=dtype, device=device, requires_grad=True)
    decay = torch.tensor(0.6, device=device, requires_grad=True) if learned else None
    s, last = kernels.neuron_step(step, v, x, decay, steps, cut=rule == "SLTT")
    results = [s, last][: 1 + (rule == "BPTT")]
    torch.autograd.backward(results, [torch.ones_like(r) for r in results])


@pytest.fixture
def compiled(monkeypatch, tmp_path):
    """Compile kernels in place of running them: a function of the GPU's architecture gives the list."""
    import triton
    from triton.backends.compiler import GPUTarget

    found = []

    def launch(kernel, grid):
        return lambda *args, **kwargs: found.append(kernel.run(*args, grid=grid, warmup=True, **kwargs))

    def on(architecture):
        target = GPUTarget("cuda", architecture, 32)
        driver = SimpleNamespace(
            get_current_device=lambda: architecture,  # a cache for each
            get_current_stream=lambda device: 0,
            get_current_target=lambda: target,
        )
        monkeypatch.setattr(triton.runtime.driver, "_active", driver)
        return found

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(triton.runtime.JITFunction, "__getitem__", launch)
    monkeypatch.setattr(step_of_kernels, "fast_step", lambda step, *_: TritonStep(step))
    return on


def check_resources(kernel, folder, at_most):
    """Check registers, that none is spilled and nothing fused; return the memory instructions of a compiled kernel."""
    import triton

    file = folder / "kernel.cubin"
    file.write_bytes(kernel.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    code = subprocess.run([tool, "-res-usage", "-sass", file], capture_output=True, text=True, check=True).stdout
    registers, stack, local = (int(re.search(rf"{name}:(\d+)", code)[1]) for name in ("REG", "STACK", "LOCAL"))
    assert (stack + local, registers <= at_most) == (0, True), registers
    assert "fma" not in kernel.asm["ptx"]
    return Counter(re.findall(r"\b(?:LDG|STG)\.E\S*", code))


@TRITON
@pytest.mark.parametrize(
    ("steps", "dtype", "state", "architecture"),
    [
        (6, torch.bfloat16, torch.float32, 90),
        pytest.param(1, torch.bfloat16, torch.float32, 80, marks=pytest.mark.slow),
        pytest.param(6, torch.float32, torch.float32, 80, marks=pytest.mark.slow),
        pytest.param(1, torch.bfloat16, torch.bfloat16, 90, marks=pytest.mark.slow),
        pytest.param(6, torch.float16, torch.float16, 90, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_compiled_for_a_gpu(steps, dtype, state, architecture, compiled, tmp_path):
    made = compiled(architecture)
    run(steps=steps, dtype=dtype, state=state)
    assert len(made) == 2  # forward and backward
    for kernel in made:
        memory = check_resources(kernel, tmp_path, {1: 48, 6: 80}[steps])
        assert {"LDG.E.128", "STG.E.128"} <= memory.keys()
        if state == torch.float32:
            assert memory.pop("STG.E", 0) == (kernel.name == "steps_forward")  # the number of spikes
            assert {name for name in memory if not name.endswith("U8")} == {"LDG.E.128", "STG.E.128"}
    rounds = re.search(r"add\.rn\.b?f16x2", made[0].asm["ptx"])  # the charge
    assert bool(rounds) == (state != torch.float32)


@TRITON
@LAYOUTS
@pytest.mark.slow
def test_values_of_each_channel_compiled_for_a_gpu(steps, last, compiled, tmp_path):
    made = compiled(90)
    x = torch.zeros(4 * steps, 64, 16, 16, dtype=torch.bfloat16)
    x = x.to(memory_format=torch.channels_last if last else torch.contiguous_format).requires_grad_()
    neuron = sltt.ChannelLIF(64)
    neuron.advance(x, steps).backward(torch.ones_like(x))
    assert len(made) == 2
    for kernel in made:
        assert "LDG.E.128" in check_resources(kernel, tmp_path, {1: 64, 6: 128}[steps])


@TRITON
@LAYOUTS
@pytest.mark.slow
def test_a_norm_in_front_compiled_for_a_gpu(steps, last, compiled, tmp_path, monkeypatch):
    made = compiled(90)
    monkeypatch.setattr(normed, "in_triton", lambda x: True)
    x = torch.zeros(4 * steps, 64, 16, 16, dtype=torch.bfloat16)
    x = x.to(memory_format=torch.channels_last if last else torch.contiguous_format).requires_grad_()
    sltt.LIF().advance_normalised(torch.nn.BatchNorm2d(64), x, None, steps, False).backward(torch.ones_like(x))
    names = ["moments", "write_factors", "steps_forward", "steps_replayed" if steps > 1 else "steps_backward"]
    assert [kernel.name for kernel in made] == [*names, "gradient"]
    for kernel in made:
        memory = check_resources(kernel, tmp_path, 136)
        assert "LDG.E.128" in memory or kernel.name == "write_factors"


@TRITON
@pytest.mark.slow
@pytest.mark.parametrize(
    ("steps", "step", "at_most"),
    [
        (6, kernels.NeuronStep(None, 1.0, None, False, False, sltt.surrogates.Triangle()), 80),
        (triton_step.REPLAYED, kernels.NeuronStep(None, 0.8, -0.3, True, False, sltt.surrogates.Gaussian()), 128),
    ],
    ids=["soft", "the largest"],
)
def test_the_gradient_of_a_learned_time_constant_compiled_for_a_gpu(steps, step, at_most, compiled, tmp_path):
    made = compiled(90)
    run(steps=steps, learned=True, step=step)
    check_resources(made[-1], tmp_path, at_most)


@pytest.fixture
def launched(monkeypatch):
    """List the kernels that would run on a GPU, on fake tensors."""
    names = []
    monkeypatch.setattr(TritonStep, "_launch", lambda self, kernel, *_, **__: names.append(kernel.fn.__name__))
    monkeypatch.setattr(triton_step, "problem", lambda device: None)
    with FakeTensorMode():
        yield names


NORM = 16  # bytes that a BatchNorm of 16 bits moves: x twice and y forward; gradient and x twice, ∂L/∂x backward


@TRITON
@pytest.mark.parametrize(("steps", "share"), [(1, 0.85), (6, 0.75)])
def test_a_norm_in_front_moves_fewer_bytes(steps, share, monkeypatch):
    """Count the bytes of all tensors as large as a state, and the launches, which do not depend on T."""
    launched, moved = [], []
    monkeypatch.setattr(normed, "in_triton", lambda x: True)
    monkeypatch.setattr(step_of_kernels, "fast_step", lambda step, *_: TritonStep(step))

    def count(name, *arguments):
        launched.append(name)
        tensors = [one for one in arguments if isinstance(one, torch.Tensor) and name != "write_factors"]
        moved.extend(one.nbytes for one in tensors if one.nbytes >= 2**15)

    monkeypatch.setattr(triton_norm, "launch", lambda name, grid, *arguments, **_: count(name, *arguments))
    monkeypatch.setattr(
        TritonStep, "_launch", lambda self, kernel, _, *tensors, **__: count(kernel.fn.__name__, *tensors)
    )
    x = torch.zeros(4 * steps, 64, 32, 32, dtype=torch.bfloat16, requires_grad=True)
    found = []
    for norm in (torch.nn.BatchNorm2d(64), None):
        given = (x + 0,) if norm is None else (norm, x, None)
        run = sltt.LIF.advance if norm is None else sltt.LIF.advance_normalised
        s = run(sltt.LIF(), *given, steps, True)
        s.backward(torch.ones_like(s))
        found.append(sum(moved) / x.numel())
        moved.clear()
    one, alone = found
    gradient = "steps_replayed" if steps > 1 else "steps_backward"
    assert launched[:5] == ["moments", "write_factors", "steps_forward", gradient, "gradient"]
    assert one < share * (alone + NORM)


@TRITON
@pytest.mark.parametrize(("n", "dtype"), [(1, torch.float32), (10, torch.bfloat16), (2**21, torch.float16)], ids=str)
def test_on_cuda_every_size_takes_one_kernel(n, dtype, launched):
    kernels.neuron_step(LIF, torch.zeros(n, device="cuda"), torch.zeros(n, dtype=dtype, device="cuda"))
    assert launched == ["steps_forward"]


@TRITON
def test_on_cuda_what_triton_does_not_have_runs_as_before(launched):
    class Late(sltt.surrogates.Triangle):
        def fires(self, x):
            return x > 0.5

    late = kernels.NeuronStep(0.5, 1.0, None, False, False, Late())
    of_types = [(LIF, torch.float32), (LIF, torch.float64), (LIF, torch.bfloat16), (late, torch.float32)]
    states = [(step, torch.zeros(3, dtype=dtype, device="cuda")) for step, dtype in of_types]
    chosen = [step_of_kernels.fast_step(step, v, v.dtype, None) is not None for step, v in states]
    assert chosen == [True, False, True, False]
    with kernels.using(compile="off"):
        assert step_of_kernels.fast_step(*states[0], torch.float32, None) is None


@pytest.fixture
def asked_anew():
    """Forget what is known of devices, before a test and after it."""
    cached = kernels.compiler_problem, triton_step.problem
    for one in cached:
        one.cache_clear()
    yield
    for one in cached:
        one.cache_clear()


@TRITON
def test_where_triton_fails_it_says_why(asked_anew):
    with pytest.warns(UserWarning, match="neurons run slower, since Triton does not run: "):
        assert triton_step.problem(torch.device("cpu"))  # where it has no driver
    assert triton_step.problem(torch.device("cpu"))  # without a second warning


def test_without_triton_it_says_how_to_install_it(asked_anew, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert triton_step.problem(torch.device("cuda")) == "Triton is not installed: pip install 'sltt[gpu]'"
