"""`sltt predict`: the predictions of a trained run for files."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from sltt.commands.fit_parser import make_parser
from sltt.commands.parsing import ANY_PROCESSES, CommandOptions, begin, build_run, run_folder
from sltt.commands.tables import Row, Table, number
from sltt.training.average import select_weights
from sltt.training.checkpoints import load_checkpoint, load_weights
from sltt.training.console import Console, as_json
from sltt.training.runs import find_checkpoint
from sltt.training.settings import OF_TRAINING
from sltt.training.trained import Trained, predict

HELP = (
    "Predict files by a trained run: images, recordings of events, or .npy arrays of a sample each. They are read as "
    "the test samples of the run are."
)


def options() -> CommandOptions:
    """Return the options of `sltt predict`."""
    parser = CommandOptions("sltt predict RUN FILE ...", HELP)
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE")
    parser.add_argument("--checkpoint", choices=("best", "last"), help="default: best, or last without validation")
    parser.add_code()
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser


def run(words: Sequence[str]) -> None:
    """`sltt predict RUN FILE ...`: print the prediction for each file."""
    folder, words = begin(words)
    known, run = options().parse_args(words), run_folder(folder)
    path = find_checkpoint(run, known.checkpoint)
    content, parser = load_checkpoint(path), make_parser("sltt predict", OF_TRAINING)
    built, _ = build_run(parser, run, ANY_PROCESSES, known.code, content)
    load_weights(built.model, select_weights(content), path)
    trained = built.model.trained = Trained(**content["task"])
    names = list(getattr(built.data, "classes", ()))
    found = []
    for file in known.files:
        sample = built.data.read(file, built.steps)
        prediction = predict(built.model, sample[None] if trained.static else sample[:, None])
        found.append({"file": str(file), **_describe(prediction, trained, names)})
    if known.json:
        print(as_json(found))
    else:
        Console().table(Table([_row(one) for one in found]).for_terminal())


def _describe(prediction: Tensor, trained: Trained, names: Sequence[str]) -> dict[str, Any]:
    """Return the class with its probability, where a sample has one; else the numbers."""
    if trained.classes is None or trained.prediction == "steps":
        return {"prediction": prediction.squeeze(-2).tolist()}
    index = int(prediction.argmax(1))
    name = names[index] if len(names) == trained.classes else index
    probability = float(prediction.softmax(1)[0, index])
    return {"class": name, "probability": probability, "prediction": prediction[0].tolist()}


def _row(found: dict[str, Any]) -> Row:
    if "class" not in found:
        return {"file": found["file"], "prediction": str(found["prediction"])}
    return {"file": found["file"], "class": str(found["class"]), "probability": number(found["probability"], ".1%")}
