"""The tests of a CUDA device, on one of its own type in the memory of the host (`tests/standin`), as a process."""

import os
import shutil
import subprocess
import sys

import pytest

MISSING = [tool for tool in ("g++", "ninja") if shutil.which(tool) is None]


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.skipif(bool(MISSING), reason=f"the device is compiled by {' and '.join(MISSING)} (apt install them)")
@pytest.mark.parametrize("tests", [["tests/test_cuda.py"], ["-p", "tests.standin.trainings", "tests/training"]])
def test_what_runs_on_cuda_runs_on_a_device_without_a_gpu(tests):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", "-p", "no:cacheprovider", "--timeout", "0"]
    quiet = ["-W", "ignore:An output with one or more elements was resized", "-W", "ignore:Module already imported"]
    given = os.environ | {"STANDIN": "1", "TRITON_INTERPRET": "1"}
    done = subprocess.run([*command, *quiet, *tests], env=given, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
