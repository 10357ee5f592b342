import pytest
import torch

import sltt
from sltt import kernels
from sltt.kernels.options import COMPILE_FROM, Kernel


def test_options_are_restored():
    with pytest.raises(RuntimeError, match="planted"), kernels.using(compile="off", bits=False):
        raise RuntimeError("planted")
    from sltt.kernels.options import options

    assert options().bits
    assert options().compile == "auto"


def test_a_kernel_that_does_not_compile_runs_eagerly_with_a_warning():
    class Breaks(sltt.surrogates.Surrogate):
        def derivative(self, x):
            torch._dynamo.graph_break()
            return torch.ones_like(x)

    x = torch.randn(COMPILE_FROM, requires_grad=True)
    neuron = sltt.LIF(surrogate=Breaks())
    spikes = neuron(x)
    with pytest.warns(UserWarning, match="compiling a kernel failed"):
        spikes.sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))
    sltt.reset(neuron)
    neuron(x).sum().backward()  # silently from now on


def test_compiling_is_demanded_where_a_kernel_runs(monkeypatch):
    def problem(device):
        return {"cpu": "there is no C++ compiler", "meta": None}[device.type]  # as on a GPU, which needs none

    def add(out, x):
        out.copy_(x + 1)

    monkeypatch.setattr("sltt.kernels.options.compiler_problem", problem)
    monkeypatch.setattr(torch, "compile", lambda function, **kwargs: function)
    x = torch.randn(8)
    with kernels.using(compile="on"):
        Kernel(add)(*torch.empty(2, 8, device="meta"))
        with pytest.raises(ValueError, match=r"compile='on', but there is no C\+\+ compiler; use 'auto'"):
            Kernel(add)(torch.empty_like(x), x)


@pytest.mark.slow
@pytest.mark.skipif(torch.backends.cpu.get_cpu_capability() != "AVX512", reason="needs two widths of vectors")
def test_code_for_other_vectors_is_not_taken_from_the_compilers_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    from torch._inductor import config

    headers_as_they_are = config.patch(cpp_cache_precompile_headers=False)  # to compile them takes longer than it saves
    x = torch.randn(4096)

    def add(out, x):
        out.copy_(x + 1)

    for name in ("AVX512", "AVX2"):  # as in processes with these limits, one after the other
        monkeypatch.setenv("ATEN_CPU_CAPABILITY", name.lower())
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda name=name: name)
        out = torch.full_like(x, torch.nan)
        with kernels.using(compile="on"), headers_as_they_are:
            Kernel(add)(out, x)
        assert torch.equal(out, x + 1)
