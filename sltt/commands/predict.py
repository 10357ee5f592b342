"""Predict files by a trained run: images, recordings of events, .wav, .csv or .npy, a sample each.

They are read as the test samples of the run are. With --stream N, FILE (or - for standard input) is one sequence: a
time step in each line, its numbers in row-major order. A decision is printed after every N time steps.

"""

import math
import sys
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sltt.commands.failures import UsageError
from sltt.commands.parsing import CommandOptions, begin, count, load_run
from sltt.commands.tables import Row, Table, numeral
from sltt.losses import predict_from
from sltt.rules.stream import Stream
from sltt.training.console import Console, as_json
from sltt.training.trained import Trained, predict


def options() -> CommandOptions:
    parser = CommandOptions("sltt predict RUN FILE ...", __doc__)
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE")
    parser.add_checkpoint()
    parser.add_code()
    parser.add_argument("--stream", type=count, metavar="N", help="decide after every N time steps of one sequence")
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser


def run(words: Sequence[str]) -> None:
    folder, words = begin(words)
    args = options().parse_args(words)
    built, _, content = load_run("sltt predict", folder, args.code, args.checkpoint)
    trained: Any = built.model.trained
    names = content["names"]
    if args.stream:
        if trained.static or len(args.files) > 1:
            raise UsageError("--stream takes one file, for a run that was trained on sequences")
        shape = content["sample"]["x"].shape[1:] if content.get("sample") else (-1,)
        stream, steps, step = Stream(built.model), _read_steps(args.files[0], shape), 0
        while chunk := [*islice(steps, args.stream)]:
            step += len(chunk)
            prediction = predict_from(trained.prediction, stream(torch.stack(chunk)[:, None]))
            decision = {"step": step, **_describe(prediction, trained, names)}
            share = numeral(decision.get("probability"), ".1%").text
            columns = step, decision.get("class", decision["prediction"]), share
            print(as_json(decision) if args.json else "\t".join(map(str, columns)), flush=True)
        if not step:
            raise ValueError(f"{args.files[0]} has no line: expected the numbers of a time step in each")
        return
    predictions = []
    try:
        for file in args.files:
            try:
                sample = built.dataset.read(file, built.steps)
                shape = sample.shape if trained.static else sample.shape[1:]
                if (seen := content.get("sample")) and shape != (expected := seen["x"].shape[1:]):
                    raise ValueError(f"expected one sample of {list(expected)} values in a file, got {list(shape)}")
                prediction = predict(built.model, sample[None] if trained.static else sample[:, None])
            except Exception as error:
                error.add_note(f"the file is {file}")
                raise
            predictions.append({"file": str(file), **_describe(prediction, trained, names)})
    finally:  # those before a file that cannot be read, too
        if args.json:
            print(as_json(predictions))
        elif predictions:
            Table([_row(prediction_of_file) for prediction_of_file in predictions]).show(Console())


def _read_steps(file: Path, shape: Sequence[int]) -> Iterator[Tensor]:
    """Yield the inputs of time steps, of a shape [...]."""
    with sys.stdin if str(file) == "-" else file.open(encoding="utf-8") as lines:
        for i, line in enumerate(lines, 1):
            try:
                yield torch.tensor([float(word) for word in line.replace(",", " ").split()]).reshape(shape)
            except (ValueError, RuntimeError):
                size = f"{math.prod(shape)} " * (shape[0] > 0)
                expected = f"expected the {size}numbers of a time step in line {i}"
                raise ValueError(f"{file}: {expected}, got {line!r:.60}") from None


def _describe(prediction: Tensor, trained: Trained, names: Sequence[str]) -> dict[str, Any]:
    """Return the class with its probability, where a sample has one; else the numbers."""
    if trained.classes is None or prediction.ndim > 2:
        return {"prediction": prediction.squeeze(int(trained.prediction == "steps")).tolist()}
    index = int(prediction.argmax(1))
    name = names[index] if index < len(names) == trained.classes else index
    probability = float(prediction.softmax(1)[0, index])
    return {"class": name, "probability": probability, "prediction": prediction[0].tolist()}


def _row(prediction: dict[str, Any]) -> Row:
    if "class" not in prediction:
        return {"file": prediction["file"], "prediction": str(prediction["prediction"])}
    share = numeral(prediction["probability"], ".1%")
    return {"file": prediction["file"], "class": str(prediction["class"]), "probability": share}
