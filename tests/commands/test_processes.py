import platform
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

import sltt
from sltt.commands.parsing import shipped_recipes
from tests.commands.tiny import TINY, environment


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries are left as they are")
def test_train_keeps_freed_memory_until_it_is_returned():
    code = """
import resource, sys, torch
from sltt.commands import COMMANDS, main
from sltt.commands.failures import cause
from sltt.parallel.devices import return_freed_memory
main(["train", *sys.argv[1:]])
faults = []
for turn in range(4):
    if turn == 3:
        return_freed_memory()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(2**24)
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(*faults)
"""
    words = [sys.executable, "-c", code, "--nonsense"]
    result = subprocess.run(words, env=environment(), capture_output=True, text=True)
    first, second, third, returned = (int(word) for word in result.stdout.split())
    assert max(second, third) < first / 10 < returned / 5


@pytest.mark.slow
def test_ctrl_c_in_the_terminal_ends_with_a_clear_line(here):
    words = [sys.executable, "-m", "sltt", "train", *TINY, "--epochs", "1000", "--run", "a"]
    process = subprocess.Popen(words, env=environment(), stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    while not Path("a/last.ckpt").exists():
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err.strip() == "sltt: stopped by Ctrl-C; continue with --resume a"


@pytest.mark.slow
def test_the_wheel_holds_the_recipes_and_works_elsewhere(here):
    project = Path(sltt.__file__).parents[1]
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(here), str(project)]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = here.glob("sltt-*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {f"sltt/recipes/{name}.yaml" for name in shipped_recipes()} <= set(names)
    assert not [name for name in names if name.startswith(("tests", "benchmarks"))]
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", "site", str(wheel)]
    subprocess.run(install, check=True, capture_output=True)
    elsewhere = {**environment(), "PYTHONPATH": str(here / "site")}
    result = subprocess.run([here / "site/bin/sltt", "recipes"], env=elsewhere, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert [line.split()[0] for line in result.stdout.splitlines()] == list(shipped_recipes())
    heavy = "{'sklearn', 'lightning_fabric', 'torchvision', 'tensorboard'}"
    code = f"import sltt, sys; print(sltt.__file__); print({heavy} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], env=elsewhere, capture_output=True, text=True)
    assert result.stdout.splitlines() == [str(here / "site/sltt/__init__.py"), "set()"]
