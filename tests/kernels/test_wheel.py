"""Wheels with compiled kernels: built, unpacked, loaded without a compiler, and run for other machines and systems."""

import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from hatch_build import PLATFORMS, compiler_for
from sltt.kernels import native
from sltt.kernels.layers import sparse
from tests.kernels.exact import NATIVE

ROOT = Path(__file__).parents[2]
pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]  # a library takes the compiler half a minute, alone


def unpacked(target, folder):
    """Build the wheel of a platform, and unpack it."""
    compiler = compiler_for(target)
    if (importlib.util.find_spec("ziglang") if "ziglang" in compiler else shutil.which(compiler[0])) is None:
        pytest.skip(f"{' '.join(compiler)} is not installed")
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, ROOT]
    subprocess.run(build, cwd=folder, env={**os.environ, "SLTT_KERNELS": target}, capture_output=True, check=True)
    (wheel,) = folder.glob(f"sltt-*-py3-none-{target}.whl")
    zipfile.ZipFile(wheel).extractall(folder / "site")
    tracked = subprocess.run(["git", "ls-files", "sltt"], cwd=ROOT, capture_output=True, text=True).stdout.split()
    there = {path.relative_to(folder / "site").as_posix() for path in (folder / "site" / "sltt").rglob("*.*")}
    assert {name for name in there if "/shipped/" not in name} == {*tracked}
    libraries = [*(folder / "site" / "sltt" / "kernels" / "shipped").iterdir()]
    assert len(libraries) == len(PLATFORMS[target])
    for library in libraries:
        names = {name.decode() for name in re.findall(rb"\b_?(sltt_\w+)\0", library.read_bytes())}
        assert names == {*native._FUNCTIONS, *["sltt_openmp"] * ("linux" not in target)}
        if "linux" in target:  # no symbol is newer than the GNU C library of the wheel's name
            needed = re.findall(rb"GLIBC_2\.(\d+)", library.read_bytes())
            assert 2 < max(map(int, needed)) <= 17
    return folder / "site"


LOADS = """
import torch
from hatch_build import PLATFORMS, compiler_for
from sltt.kernels import native
from sltt.kernels.layers import sparse
from sltt.kernels.spikes.bits import pack

assert native.problem() is None, native.problem()
x, weight = (torch.rand(4, 16, 12, 12) < 0.3).float(), torch.randn(16, 16, 3, 3)
x, weight = (t.contiguous(memory_format=torch.channels_last) for t in (x, weight))
layer = sparse.conv_layer(x.shape, weight.shape, (1, 1), ((1, 1), (1, 1)))
y = sparse.forward(layer, pack(x), sparse.pack_weight(layer, weight), None, x.dtype)
torch.testing.assert_close(y, torch.nn.functional.conv2d(x, weight, padding=1), rtol=1e-4, atol=1e-4)
print(native.origin(), native._path())
"""


def loads(folder, environment):
    return subprocess.run([sys.executable, "-c", LOADS], env=environment, cwd=folder, capture_output=True, text=True)


@NATIVE
def test_the_kernels_of_a_wheel_load_without_a_compiler(tmp_path):
    site = unpacked(f"manylinux_2_17_{platform.machine()}", tmp_path)
    capabilities = {"avx2": "x86-64-v3", "avx512": "x86-64-v4"} if platform.machine() == "x86_64" else {"": "aarch64"}
    best = torch.backends.cpu.get_cpu_capability().lower()
    environment = {"PATH": "", "PYTHONPATH": str(site), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    for capability, name in capabilities.items():
        if capability <= best:
            done = loads(tmp_path, environment | {"ATEN_CPU_CAPABILITY": capability})
            assert done.returncode == 0, done.stderr
            assert done.stdout.startswith(f"shipped for {name} {site}")
    assert not (tmp_path / "cache").exists()
    source = site / "sltt" / "kernels" / "spikes.h"
    source.write_text(source.read_text() + "\n")  # the library is of other sources
    done = loads(tmp_path, environment)
    assert "there is no C++ compiler" in done.stderr


def kernel_calls():
    """The arrays that kernels read and write, by name, and calls of each kernel on some of them."""
    rng = np.random.default_rng(0)

    def normal(*shape):
        return rng.standard_normal(shape, dtype=np.float32)

    def spikes(*shape):
        return (rng.random(shape) < 0.2).astype(np.float32)

    def half(x):
        return torch.from_numpy(x).bfloat16().view(torch.uint16).numpy()

    layer = sparse.conv_layer((2, 64, 9, 9), (96, 64, 3, 3), (1, 1), ((1, 1), (1, 1)))
    x, g, cells, windows = spikes(2, 9, 9, 64), normal(2, 9, 9, 96), 5 * 7 * 32, (2, 6, 8, 5, 2, 2, 3, 4)
    frames, width = spikes(2, 6, 8, 5), 48
    arrays = {"conv": np.array(layer.sizes), "stride": np.array([64 * 9, 9, 3, 1])}
    arrays |= {"stride_last": np.array([64 * 9, 1, 64 * 3, 64])}
    arrays |= {"table": (np.arange(256)[:, None] >> np.arange(8) & 1).astype(np.float32)}
    arrays |= {"weight": normal(96, 64, 3, 3) / 8, "packed": np.zeros(layer.packed_size, np.float32)}
    arrays |= {"bias": normal(96), "norm_bias": normal(32), "norm_weight": normal(32), "mean": np.zeros(32, np.float32)}
    arrays |= {"var": np.ones(32, np.float32), "momenta": np.full(3, 0.1), "factors": np.zeros(4 * 3 * 32, np.float32)}
    arrays |= {"windows": np.array(windows), "recurrent_weight": normal(width, width) / 4}
    arrays |= {"recurrent_x": normal(4, 6, width), "recurrent_s": np.zeros((4, 6, width), np.float32)}
    arrays |= {"recurrent_v": np.zeros((4, 6, width), np.float32), "recurrent_u": np.zeros((4, 6, width), np.float32)}
    arrays |= {"first_s": spikes(6, width), "first_v": normal(6, width)}
    calls = []
    for kind, number in (("float", np.float32), ("half", np.uint16)):
        cast = half if kind == "half" else np.copy
        size, is_half = np.dtype(number).itemsize, kind == "half"
        new = {"x": cast(x), "g": cast(g), "bits": np.zeros(x.size // 8, np.uint8)}
        new |= {"looked": np.zeros(x.size // 8, np.uint8), "one": np.zeros(1, number)}
        new |= {"unpacked": np.zeros(x.size, number), "y": np.zeros(g.shape, number)}
        new |= {"of_weight": np.zeros((96, 3, 3, 64), np.float32)}
        new |= {"of_weight_dense": np.zeros((96, 3, 3, 64), np.float32), "of_x": np.zeros(x.shape, number)}
        new |= {"current": cast(2 * normal(3, cells)), "v": normal(cells), "s": np.zeros((3, cells), number)}
        new |= {"v_out": np.zeros(cells, np.float32), "u": np.zeros((3, cells), np.float32)}
        new |= {"fired": np.zeros(3 * cells // 8, np.uint8), "of_s": cast(normal(3, cells)), "of_v": normal(cells)}
        new |= {"of_current": np.zeros((3, cells), number), "of_first": np.zeros(cells, np.float32)}
        new |= {"rate": np.zeros(cells, number), "slope": np.zeros(cells, number)}
        new |= {"by_decay": np.zeros(cells, np.float32), "frames": cast(frames), "most": np.zeros((2, 3, 4, 5), number)}
        new |= {"positions": np.zeros((2, 3, 4, 5), np.uint8), "of_most": cast(normal(2, 3, 4, 5))}
        new |= {"of_frames": np.zeros(frames.shape, number), "total": cast(normal(2, 6, 8, 5))}
        new |= {"largest": cast(normal(2, 3, 4, 5)), "sum": np.zeros(frames.shape, np.float32)}
        new |= {"largest_sum": np.zeros((2, 3, 4, 5), np.float32), "running": np.zeros((2, 3, 4, 5), number)}
        arrays |= {f"{kind}_{name}": array for name, array in new.items()}
        bytes_ = x.size // 8

        def call(name, *args, kind=kind, new=new):
            calls.append((name, [f"{kind}_{a}" if isinstance(a, str) and a in new else a for a in args]))

        call("sltt_pack_bits", "x", size, "bits", bytes_, 1)
        call("sltt_count", "bits", bytes_)
        call("sltt_look", "x", size, "looked", bytes_, "one", 1)
        call("sltt_same", "bits", "looked", bytes_)
        call("sltt_unpack_bits", "bits", bytes_, "table", 4, "of_weight", 1)
        call("sltt_pack", "weight", "stride", "conv", 1.0, "packed", 1)
        call("sltt_forward", "bits", "conv", "packed", "bias", "y", is_half, 1)
        call("sltt_weight_gradient", "bits", "conv", "g", is_half, 0.5, "of_weight", "stride_last", 1)
        call("sltt_input_gradient", "conv", "weight", "stride", "g", is_half, "of_x", 1)
        call("sltt_dense_weight_gradient", "conv", "x", "g", is_half, "of_weight_dense", 1)
        for surrogate in range(4):
            for soft in range(2):
                place = f"neuron_{surrogate}_{soft}"
                constants = np.array([0.5, 1.0, 0.7, 0.0, 0.7, 1.0, *4 * [0], 1.0, 1.0, 1.0], np.float32)
                constants.view(np.int32)[6:10] = soft, 0, surrogate % 2, surrogate
                arrays[place] = constants
                call("sltt_neuron", place, None, 0, is_half, "current", "v", "s", "v_out", 0, "u", "fired", cells, 3, 1)
                given = ["of_s", "of_v", "u", "s", None, "current", "of_current", "of_first", None]
                call("sltt_neuron_gradient", place, None, 0, 0, is_half, is_half, *given, cells, 3, 0, 1)
        call("sltt_steady", place, is_half, "current", 0.0, 4, "rate", "slope", "by_decay", cells, 1)
        affine = ["mean", "var", "norm_weight", "norm_bias"]
        call("sltt_norm", is_half, "current", cells, 3, 32, *affine, 1, "momenta", 1e-5, "factors", 1)
        call("sltt_max_pool", "windows", is_half, "frames", "most", "positions", 1)
        call("sltt_max_pool_gradient", "windows", is_half, "of_most", "positions", "of_frames", 1)
        totals = ["total", "largest", "sum", "largest_sum", "running"]
        call("sltt_running_max", "windows", is_half, is_half, "frames", *totals, 1)
    states = ["first_s", "first_v", "recurrent_s", "recurrent_v", 6 * width, "recurrent_u"]
    given = ["recurrent_x", "recurrent_weight", width, "bias", *states]
    calls.append(("sltt_recurrent", [place, *given, 6, width, 4, 1]))
    assert {name for name, _ in calls} == set(native._FUNCTIONS)
    return arrays, calls


TYPES = {
    native._P: "void *",
    native._A: "void *",
    native._N: "long long",
    native._I: "int",
    native._F: "float",
    native._D: "double",
}


def program(arrays, calls):
    """C++ that reads the arrays, makes the calls, and writes the arrays, each call's result behind them."""
    found = [
        f'auto {name} = ({TYPES.get(result, "void")} (*)({", ".join(TYPES[kind] for kind in kinds)}))FIND("{name}");'
        for name, (result, kinds) in native._FUNCTIONS.items()
    ]
    places = [f"alignas(64) static char {name}[{array.nbytes}];" for name, array in arrays.items()]
    lines = [f"fread({name}, 1, sizeof {name}, stdin);" for name in arrays]
    for i, (name, args) in enumerate(calls):
        given = ", ".join("nullptr" if a is None else f"{a}" if isinstance(a, str) else f"{+a}" for a in args)
        lines.append(f"{name}({given});" if native._FUNCTIONS[name][0] is None else f"result[{i}] = {name}({given});")
    lines += [f"fwrite({name}, 1, sizeof {name}, stdout);" for name in [*arrays, "result"]]
    return "\n".join(
        [
            "#include <cstdio>",
            "#ifdef _WIN32",
            "#include <windows.h>\n#include <fcntl.h>",
            "#define OPEN _setmode(0, O_BINARY), _setmode(1, O_BINARY), LoadLibraryA",
            "#define FIND(name) GetProcAddress(library, name)",
            "#else",
            "#include <dlfcn.h>\n#define OPEN(path) dlopen(path, RTLD_NOW)\n#define FIND(name) dlsym(library, name)",
            'extern "C" void GOMP_parallel(void (*function)(void *), void *data, unsigned, unsigned) {function(data);}',
            'extern "C" int omp_get_thread_num() { return 0; }',
            "#endif",
            *places,
            f"static long long result[{len(calls)}];",
            "int main(int, char **words) {",
            "auto library = (OPEN(words[1]));",
            *found,
            *lines,
            "}",
        ]
    )


@NATIVE
@pytest.mark.parametrize(
    ("target", "emulator"),
    [("manylinux_2_17_aarch64", ["qemu-aarch64", "-L", "/usr/aarch64-linux-gnu"]), ("win_amd64", ["wine"])],
)
def test_kernels_for_others_give_the_numbers_of_this_machine(target, emulator, tmp_path):
    if shutil.which(emulator[0]) is None:
        pytest.skip(f"{emulator[0]} is not installed")
    library = min((unpacked(target, tmp_path) / "sltt" / "kernels" / "shipped").iterdir())
    arrays, calls = kernel_calls()
    (tmp_path / "calls.cpp").write_text(program(arrays, calls))
    flags = ["-mcpu=x86_64_v3"] if target == "win_amd64" else ["-rdynamic"]  # zig has its C library for this one
    compiler = [*compiler_for(target), *flags, "-O1", "-o", "calls.exe", "calls.cpp"]
    subprocess.run(compiler, cwd=tmp_path, check=True)
    given = b"".join(array.tobytes() for array in arrays.values())
    there = subprocess.run([*emulator, "calls.exe", library], cwd=tmp_path, input=given, capture_output=True)
    assert there.returncode == 0, there.stderr
    found = native.library()
    results = np.zeros(len(calls), np.int64)
    before = {name: array.copy() for name, array in arrays.items()}
    for i, (name, args) in enumerate(calls):
        pointers = [arrays[a].ctypes.data if isinstance(a, str) else a for a in args]
        results[i] = getattr(found, name)(*pointers) or 0
    changed, place = set(), 0
    for name, here in [*arrays.items(), ("result", results)]:
        got = np.frombuffer(there.stdout, here.dtype, here.size, place).reshape(here.shape)
        place += here.nbytes
        tolerance = {"float32": (1e-5, 1e-5), "uint16": (0, 1)}.get(here.dtype.name, (0, 0))  # sums may differ in order
        np.testing.assert_allclose(got, here, *tolerance, err_msg=name)
        if name != "result" and not np.array_equal(arrays[name], before[name]):
            changed.add(name)
    written = {"bits", "looked", "one", "y", "of_weight", "of_weight_dense", "of_x", "s", "u", "v_out", "fired"}
    assert changed >= {f"{kind}_{name}" for kind in ("float", "half") for name in written}
    assert len(there.stdout) == place


def test_a_wheel_for_macos_has_the_kernels(tmp_path):
    (library,) = (unpacked("macosx_11_0_arm64", tmp_path) / "sltt" / "kernels" / "shipped").iterdir()
    assert library.read_bytes()[:8] == bytes.fromhex("cffaedfe0c000001")  # Mach-O of 64 bits, for arm64
