"""Write a trained network into one file, with its settings and the names of its classes, to use in place of a run."""

from collections.abc import Sequence
from pathlib import Path

from sltt.commands.parsing import CommandOptions, begin, load_run
from sltt.training.average import select_weights
from sltt.training.checkpoints import save_checkpoint
from sltt.training.console import Console


def options() -> CommandOptions:
    parser = CommandOptions("sltt pack RUN", __doc__)
    parser.add_checkpoint()
    parser.add_code()
    return parser


def run(words: Sequence[str]) -> None:
    folder, words = begin(words)
    known = options().parse_args(words)
    built, _, content = load_run("sltt pack", folder, known.code, known.checkpoint)
    out = Path(f"{folder.rstrip('/')}.sltt")
    kept = {name: content[name] for name in ("task", "config", "progress")}
    names = [*getattr(built.data, "classes", ())]
    save_checkpoint(out, {**kept, "model": select_weights(content), "names": names})
    Console().line(f"{out}, {out.stat().st_size / 1e6:.3g} MB")
