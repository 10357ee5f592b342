"""Predict files by a trained run: images, recordings of events, or .npy arrays of a sample each.

They are read as the test samples of the run are.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from sltt.commands.parsing import CommandOptions, begin, load_run
from sltt.commands.tables import Row, Table, number
from sltt.training.console import Console, as_json
from sltt.training.trained import Trained, predict


def options() -> CommandOptions:
    parser = CommandOptions("sltt predict RUN FILE ...", __doc__)
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE")
    parser.add_checkpoint()
    parser.add_code()
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser


def run(words: Sequence[str]) -> None:
    folder, words = begin(words)
    known = options().parse_args(words)
    built, _, content = load_run("sltt predict", folder, known.code, known.checkpoint)
    built.model.trained = trained = Trained(**content["task"])  # pyright: ignore[reportArgumentType]
    names = list(getattr(built.data, "classes", ()))
    found = []
    for file in known.files:
        sample = built.dataset.read(file, built.steps)
        prediction = predict(built.model, sample[None] if trained.static else sample[:, None])
        found.append({"file": str(file), **_describe(prediction, trained, names)})
    if known.json:
        print(as_json(found))
    else:
        Table([_row(one) for one in found]).show(Console())


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
