"""The commands: `sltt train`, `sltt profile`, `sltt report` and the others, a file for each."""

import os
import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.metadata import version

from sltt.commands.failures import UsageError, tell
from sltt.commands.hints import nearest
from sltt.parallel.signals import PREEMPTED, Preempted

COMMANDS = (
    "train", "eval", "agreement", "compare", "profile", "report", "export", "recipes", "data", "doctor", "completion",
)  # fmt: skip
USAGE = """usage: sltt COMMAND ...

  sltt train [RECIPE] [OPTION ...]   train a recipe (default: digits), or a YAML file of your own
  sltt eval RUN [OPTION ...]         measure a trained run on its test samples
  sltt agreement [RECIPE] [OPTION …] how near SLTT's gradient is to that of BPTT: --taus --steps --at-epochs
  sltt compare [RECIPE] [OPTION …]   train several rules under the same budget: --rules BPTT,SLTT,SLTT:k=1
  sltt profile [RECIPE] [OPTION …]   memory, time, operations and energy: --rules --steps --budget 8GB
  sltt report FOLDER ...             one page of all that: comparison, costs, agreement, spikes
  sltt export RUN --to nir|onnx      write a trained network for other tools
  sltt recipes [NAME]                list the recipes, or print one
  sltt data check RECIPE [OPTION …]  whether a recipe's data is whole: --data.root DIR
  sltt doctor                        what works on this machine, and what would make it faster
  sltt completion bash|zsh           let the shell complete: source <(sltt completion bash)
  sltt --version                     the version

`sltt train RECIPE --help` explains every option, with the recipe's values.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns the exit code: 0, 1 for a run that failed, 2 for wrong usage, 75 for SIGTERM, 130 for Ctrl-C.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or words[0] in ("-h", "--help"):
        print(USAGE, end="")
        return 0 if words else 2
    if words == ["--version"]:
        print(f"sltt {version('sltt')}")
        return 0
    command, *rest = words
    _find_own_modules()
    try:
        if command not in COMMANDS:
            raise UsageError(f"unknown command {command!r}{nearest(command, COMMANDS)}")
        import_module(f"sltt.commands.{command}").run(rest)
    except KeyboardInterrupt as stop:
        return _stopped(stop, 130)
    except Preempted as stop:
        return _stopped(stop, PREEMPTED)
    except Exception as error:  # of the user's own classes too
        if os.environ.get("SLTT_TRACEBACK"):
            raise
        return tell(error, command if command in COMMANDS else "")
    return 0


def _find_own_modules() -> None:
    """Import from the working directory, as `python -m` does, so that a recipe may name classes beside it."""
    if not sys.flags.safe_path and not {"", os.getcwd()} & set(sys.path):
        sys.path.insert(0, os.getcwd())


def _stopped(stop: BaseException, code: int) -> int:
    rank = next((os.environ[key] for key in ("RANK", "SLURM_PROCID", "LOCAL_RANK") if key in os.environ), "0")
    if rank == "0":  # once, not from every process
        print(f"sltt: {str(stop) or 'stopped by Ctrl-C'}", file=sys.stderr)
    return code
