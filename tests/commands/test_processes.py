import platform
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.commands.tiny import TINY, environment


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries are left as they are")
def test_train_keeps_freed_memory_until_glibc_is_told_to_return_it():
    code = """
import ctypes, resource, sys, torch
from sltt.commands import COMMANDS, main
from sltt.commands.failures import cause
main(["train", *sys.argv[1:]])
faults = []
for turn in range(4):
    if turn == 3:
        ctypes.CDLL(None).malloc_trim(0)
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
    assert err.strip() == "sltt: stopped by Ctrl-C; continue with --resume a, in Python with resume=True"
