"""Write a trained network into one file, with all that a prediction needs, to use in place of a run."""

from collections.abc import Sequence
from pathlib import Path

from sltt.commands.parsing import CommandOptions, begin, load_run
from sltt.training.average import select_weights
from sltt.training.checkpoints import save_checkpoint
from sltt.training.console import Console


def options() -> CommandOptions:
    parser = CommandOptions("sltt pack RUN", __doc__)
    parser.add_argument("--out", type=Path, metavar="FILE", help="a new file; default: RUN.sltt")
    parser.add_checkpoint()
    parser.add_code()
    return parser


def run(words: Sequence[str]) -> None:
    folder, words = begin(words)
    args = options().parse_args(words)
    _, _, content = load_run("sltt pack", folder, args.code, args.checkpoint)
    out = args.out or Path(f"{folder.rstrip('/')}.sltt")
    if out.exists():
        raise FileExistsError(f"{out} exists, and may be of another run: remove it, or name another file by --out")
    names = "task", "config", "layers", "code", "progress", "names", "statistics", "sample"
    kept = {name: content.get(name) for name in names}
    out.parent.mkdir(parents=True, exist_ok=True)
    save_checkpoint(out, {**kept, "model": select_weights(content)})
    Console().line(f"{out}, {out.stat().st_size / 1e6:.3g} MB")
