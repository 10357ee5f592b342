"""`sltt export`: write a trained network for other tools."""

from collections.abc import Sequence
from pathlib import Path

from sltt.commands.export_c import default_name, export
from sltt.commands.fit_parser import make_parser
from sltt.commands.parsing import ANY_PROCESSES, CommandOptions, begin, build_run, run_folder
from sltt.training.average import select_weights
from sltt.training.checkpoints import load_checkpoint, load_weights
from sltt.training.console import Console
from sltt.training.runs import find_checkpoint
from sltt.training.settings import OF_TRAINING

HELP = (
    "Write the selected weights of a run as a NIR graph, as an ONNX model of one time step with the states as inputs "
    "and outputs, or as C for a microcontroller."
)


def options() -> CommandOptions:
    """Return the options of `sltt export`."""
    parser = CommandOptions("sltt export RUN", HELP)
    parser.add_argument("--to", required=True, choices=("nir", "onnx", "c"))
    parser.add_argument("--out", type=Path, metavar="FILE", help="default: graph.nir, step.onnx or folder c in the run")
    parser.add_code()
    parser.add_argument("--dt", type=float, default=1e-4, help="seconds of a time step, for NIR; default: 0.0001")
    parser.add_argument("--name", help="what the names in C begin with; default: the recipe's")
    parser.add_argument("--weights", choices=("float32", "int8"), default="float32", help="in C; default: float32")
    return parser


def run(words: Sequence[str]) -> None:
    """`sltt export RUN --to nir|onnx|c`: write a trained network for other tools."""
    folder, words = begin(words)
    known, run = options().parse_args(words), run_folder(folder)
    path = find_checkpoint(run)
    content, parser = load_checkpoint(path), make_parser("sltt export", OF_TRAINING)
    built, _ = build_run(parser, run, ANY_PROCESSES, known.code, content)
    load_weights(built.model, select_weights(content), path)
    splits = built.data.splits(built.steps)
    x = splits.one()
    frame = x if splits.static else x[0]
    out = known.out or run / {"nir": "graph.nir", "onnx": "step.onnx", "c": "c"}[known.to]
    report = Console()
    if known.to == "c":
        name = default_name(run) if known.name is None else known.name
        return export(built, splits, out, name, known.weights, report)
    out.parent.mkdir(parents=True, exist_ok=True)
    try:
        if known.to == "nir":
            import nir  # pyright: ignore[reportMissingImports]

            from sltt.interop import to_nir

            nir.write(out, to_nir(built.model, frame, dt=known.dt))
            report.line(f"written to {out}; a time step is {known.dt:g} seconds")
        else:
            from sltt.interop import to_onnx

            first = to_onnx(built.model, frame, out)
            report.line(f"written to {out}: one time step, with the states {', '.join(first)}")
    except ModuleNotFoundError as error:
        raise RuntimeError(f"the export needs {error.name}: pip install 'sltt[interop]'") from error
