"""The commands: `sltt train`, `sltt profile`, `sltt report` and the others, a file for each."""

import gc
import os
import re
import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.metadata import version
from io import TextIOWrapper

from sltt.commands.failures import UsageError, tell
from sltt.commands.hints import suggest
from sltt.parallel.signals import PREEMPTED, Preempted

USAGE = """usage: sltt COMMAND ...

  sltt train [RECIPE]       train a recipe (default: digits), or a YAML file
  sltt eval RUN             accuracy of a trained run on the test samples
  sltt predict RUN FILE ... the classes of images, recordings or arrays
  sltt agreement [RECIPE]   is SLTT safe here? its gradient beside that of BPTT
  sltt compare [RECIPE]     train several rules: --rules BPTT,SLTT,SLTT:k=1
  sltt fscil [RECIPE]       new classes from a few samples: --base 6 --way 1
  sltt profile [RECIPE]     memory, time and energy of rules: --steps 1,4,16
  sltt report FOLDER ...    one page with the results of all these commands
  sltt export RUN           write a trained network: --to nir, --to onnx, --to c
  sltt pack RUN             write a trained network into one file
  sltt recipes [NAME]       list the recipes, or print one
  sltt doctor               what works on this machine, what would be faster
  sltt --version            the version

`sltt COMMAND --help` explains a command, and `sltt train RECIPE --help` all
options of a training, with the recipe's values. Most commands take these too.
"""
COMMANDS = re.findall(r"^  sltt (\w+)", USAGE, re.MULTILINE)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns the exit code: 0, 1 for a command that failed, 2 for wrong usage, 75 for SIGTERM, 130 for Ctrl-C.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):  # a terminal that has no µ shows a ? and the training goes on
            stream.reconfigure(errors="replace")
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or words[0] in ("-h", "--help"):
        print(USAGE, end="")
        return 0 if words else 2
    if words == ["--version"]:
        print(f"sltt {version('sltt')}")
        return 0
    command, *rest = words
    try:
        if command not in COMMANDS:
            raise UsageError(f"unknown command {command!r}{suggest(command, COMMANDS)}")
        if arguments is None:  # in a process of its own
            gc.disable()
        from sltt.training.batches import keep_all_generators  # with PyTorch

        with keep_all_generators():
            module = import_module(f"sltt.commands.{command}")
            if arguments is None:
                gc.freeze()  # what modules hold need not be looked at again
                gc.enable()
            module.run(rest)
    except KeyboardInterrupt as stop:
        return _exit_code(stop, 130)
    except Preempted as stop:
        return _exit_code(stop, PREEMPTED)
    except Exception as error:  # of the user's own classes too
        if os.environ.get("SLTT_TRACEBACK"):
            raise
        return tell(error, command if command in COMMANDS else "")
    return 0


def _exit_code(stop: BaseException, code: int) -> int:
    rank = next((os.environ[key] for key in ("RANK", "SLURM_PROCID", "LOCAL_RANK") if key in os.environ), "0")
    if rank == "0":  # once, not from every process
        print(f"sltt: {str(stop) or 'stopped by Ctrl-C'}", file=sys.stderr)
        return code
    return 0  # or the launcher would kill the first one, which is ending too
