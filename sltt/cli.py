"""The commands: `sltt train`, `sltt profile`, `sltt report` and the others."""

import argparse
import hashlib
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from sltt.failures import UsageError, tell
from sltt.hints import nearest
from sltt.interrupt import PREEMPTED, Preempted
from sltt.options import (
    Options,
    Recipe,
    begin,
    build,
    count,
    find_recipe,
    make_parser,
    numbers,
    only,
    parse,
    resumed,
    rules,
    run_config,
    shipped_recipes,
    time_steps,
)
from sltt.progress import Report, as_json, megabytes
from sltt.runs import RESUMABLE

if TYPE_CHECKING:
    from jsonargparse import Namespace
    from torch import nn

    from sltt.session import Session

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
    command, *rest = words
    _find_own_modules()
    try:
        if command not in COMMANDS:
            raise UsageError(f"unknown command {command!r}{nearest(command, COMMANDS)}")
        COMMANDS[command](rest)
    except KeyboardInterrupt as stop:
        return _stopped(stop, 130)
    except Preempted as stop:
        return _stopped(stop, PREEMPTED)
    except Exception as error:  # of the user's own classes too
        if os.environ.get("SLTT_TRACEBACK"):
            raise
        return tell(error)
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


def train(words: Sequence[str]) -> None:
    """`sltt train [RECIPE] [OPTION ...]`: train, then measure the selected weights on the test samples."""
    from sltt.devices import keep_freed_memory
    from sltt.session import session
    from sltt.settings import Execution

    keep_freed_memory()
    named = bool(words) and not words[0].startswith("-")
    continued = resumed(words)
    if continued and named:
        raise UsageError(f"--resume continues {continued} with its own recipe: leave out {words[0]!r}")
    source = run_config(continued) if continued else find_recipe(words[0] if named else "digits")
    if continued:
        only(words, RESUME_KEYS, "sltt train --resume", "a run continues with its own settings")
    parser = make_parser(f"sltt train {words[0] if named else '[RECIPE]'}")
    config = parse(parser, source, words[named:])
    folder = config.pop("run")
    config.pop("resume")
    built = build(parser, config)
    resolved = yaml.safe_load(parser.dump(config))
    with session(Execution.of(vars(built))) as here:
        _train(here, built, continued, folder, source.stem, resolved)


def _train(
    here: "Session",
    built: "Namespace",
    continued: Path | None,
    folder: str | None,
    name: str,
    resolved: dict[str, Any],
) -> None:
    """`sltt train` in each of its processes."""
    from sltt.checkpoints import load_selected
    from sltt.evaluation import measure_split
    from sltt.files import write_atomically
    from sltt.settings import Training
    from sltt.train import run_training

    splits = here.splits(built.data, built.steps)
    report = Report(quiet=here.processes.rank > 0)
    several = f", {here.processes.count} processes" if here.processes.count > 1 else ""
    report.line(f"{_summary(built.model)}, {built.rule}, T = {built.steps}{several}")
    counts = ", ".join(f"{_count(getattr(splits, n))} {n}" for n in ("train", "validation", "test"))
    report.line(f"samples: {counts} (split {splits.fingerprint})")
    result = run_training(
        here,
        built.model,
        built.data,
        Training.of(vars(built)),
        run=continued or folder,
        name=f"{name}-{type(built.rule).__name__.lower()}",
        resume=continued is not None,
        config=resolved,
        report=report,
    )
    run, sizes = result.run, {"loss": built.loss, "steps": built.steps, "batch_size": built.batch_size}
    last = selected = measure_split(here, built.model, built.data, "test", **sizes)
    if splits.validation:
        load_selected(built.model, run, "last", here.processes)
        last = measure_split(here, built.model, built.data, "test", **sizes)
    if here.processes.rank > 0:
        return
    summary = {"epoch": result.epoch, "test_accuracy": selected.accuracy, "last_epoch_test_accuracy": last.accuracy}
    write_atomically(run / "result.json", lambda file: file.write(json.dumps(summary).encode()))
    report.line(
        f"test accuracy {selected.accuracy:.2%} with the weights of epoch {result.epoch}, the best by validation; "
        f"{last.accuracy:.2%} after the last"
        if splits.validation
        else f"test accuracy {last.accuracy:.2%} after the last epoch"
    )
    report.line(f"written to {run}")


def evaluate_run(words: Sequence[str]) -> None:
    """`sltt eval RUN [OPTION ...]`."""
    from sltt.checkpoints import load_selected
    from sltt.evaluation import measure_split
    from sltt.session import session
    from sltt.settings import Execution

    folder, words = begin(words)
    options = Options("sltt eval RUN", EVAL_HELP)
    options.add_argument("--checkpoint", choices=("best", "last"), help="default: best, or last without validation")
    options.add_argument("--split", choices=("test", "validation", "train"), default="test")
    options.add_argument("--mirror", action="store_true", help="mean logits of each image and of its mirror image")
    options.add_argument("--json", action="store_true", help="print JSON")
    known, overrides = options.parse_known_args(words)
    only(overrides, EVAL_KEYS, "sltt eval", "the others belong to the training")
    run = Path(folder)
    parser = make_parser("sltt eval")
    config = parse(parser, run_config(run), overrides)
    config.devices = config.num_nodes = None  # of the training
    built = build(parser, config)
    path = load_selected(built.model, run, known.checkpoint)
    sizes = {"loss": built.loss, "steps": built.steps, "batch_size": built.batch_size}
    with session(Execution.of(vars(built))) as here:
        metrics = measure_split(here, built.model, built.data, known.split, **sizes, mirror=known.mirror)
    if known.json:
        print(as_json({"checkpoint": str(path), "split": known.split, "mirror": known.mirror, **vars(metrics)}))
        return
    report = Report()
    mirrored = " and their mirror images" if known.mirror else ""
    report.line(f"{path}, T = {built.steps}, {known.split} samples{mirrored}")
    report.line(f"accuracy     {metrics.accuracy:.2%}")
    report.line(f"loss         {metrics.loss:.4f}")
    report.line(f"firing rate  {metrics.firing_rate:.4f}")
    report.line(f"seconds      {metrics.seconds:.1f}")
    report.line(f"peak memory  {megabytes(metrics.peak_memory or 0)}")


def agreement(words: Sequence[str]) -> None:
    """`sltt agreement [RECIPE] [OPTION ...]`: the gradients of SLTT and truncated BPTT beside that of exact BPTT."""
    import torch

    from sltt.evidence import agreement_json, measure_agreement, print_agreement

    name, words = begin(words, "digits")
    options = Options("sltt agreement [RECIPE]", AGREEMENT_HELP)
    options.add_argument("--taus", type=numbers(float), help="time constants of the LIF neurons; default: the recipe's")
    options.add_argument("--steps", type=numbers(time_steps), help="several T; default: the recipe's")
    options.add_argument("--at-epochs", type=numbers(int), default=[0], help="after so many epochs of training each")
    options.add_argument("--samples", type=count, default=128, help="training samples in the batch that is measured")
    options.add_argument("--float64", action="store_true", help="compute in float64, where no spike flips by rounding")
    options.add_argument("--json", action="store_true", help="print JSON")
    options.add_argument("--save", type=Path, metavar="FOLDER", help=SAVE_HELP)
    known, overrides = options.parse_known_args(words)
    recipe = Recipe("sltt agreement", name, overrides)
    rows = measure_agreement(
        recipe,
        known.taus or [None],
        known.steps,
        known.at_epochs,
        known.samples,
        torch.float64 if known.float64 else None,
        Report(quiet=known.json),
    )
    _give(agreement_json(recipe.name, rows), known, "agreement.json", lambda report: print_agreement(rows, report))


def compare(words: Sequence[str]) -> None:
    """`sltt compare [RECIPE] [OPTION ...]`: train every rule with every seed, and print one table."""
    from sltt.evidence import compare, compared_json, print_compared

    name, words = begin(words, "digits")
    options = Options("sltt compare [RECIPE]", COMPARE_HELP)
    options.add_argument("--rules", type=rules, default=RULES, help=RULES_HELP)
    options.add_argument("--seeds", type=count, default=1, help="number of seeds; default: 1")
    options.add_argument(
        "--save",
        type=Path,
        metavar="FOLDER",
        help="default: runs/compare-RECIPE, and a mark of the options",
    )
    options.add_argument("--json", action="store_true", help="print JSON")
    known, overrides = options.parse_known_args(words)
    recipe = Recipe("sltt compare", name, overrides)
    # other options are another comparison
    mark = f"-{hashlib.sha256(repr(overrides).encode()).hexdigest()[:6]}" if overrides else ""
    known.save = known.save or Path("runs") / f"compare-{recipe.name}{mark}"
    for rule in known.rules:  # what is wrong with an option or a rule ends this before a training begins
        recipe.build(rule=rule)
    found = compare(known.rules, known.seeds, known.save, recipe, Report(quiet=known.json))
    _give(compared_json(recipe.name, found), known, "compare.json", lambda report: print_compared(found, report))
    if died := [f"{one.rule}, {error}" for one in found for error in one.errors]:
        raise RuntimeError(f"{len(died)} runs died; the same command tries them again: {'; '.join(died)}")


def profile(words: Sequence[str]) -> None:
    """`sltt profile [RECIPE] [OPTION ...]`: memory, seconds, operations and energy, and what fits a budget."""
    from sltt.analysis import parse_bytes
    from sltt.profiling import print_profile, profile

    name, words = begin(words, "digits")
    options = Options("sltt profile [RECIPE]", PROFILE_HELP)
    options.add_argument("--rules", type=rules, default=RULES, help=RULES_HELP)
    options.add_argument(
        "--steps", type=numbers(time_steps), default=[], help="numbers of time steps; default: the recipe's"
    )
    options.add_argument("--repeats", type=count, default=5, help="iterations that are timed; default: 5")
    options.add_argument(
        "--budget", type=parse_bytes, help="a memory such as 8GB: the largest batch, T and fold that fit it"
    )
    options.add_argument("--json", action="store_true", help="print JSON")
    options.add_argument("--save", type=Path, metavar="FOLDER", help=SAVE_HELP)
    known, overrides = options.parse_known_args(words)
    recipe = Recipe("sltt profile", name, overrides)
    report = Report(quiet=known.json)
    found = profile(recipe, known.rules, known.steps, known.repeats, known.budget, report)
    _give(found.as_dict(), known, "profile.json", lambda report: print_profile(found, report))


def report(words: Sequence[str]) -> None:
    """`sltt report FOLDER ...`: one page of what the commands measured and of runs."""
    from sltt.gather import gather
    from sltt.report import write

    options = Options("sltt report", REPORT_HELP)
    options.add_argument("folders", nargs="+", type=Path, metavar="FOLDER", help="of a run, or one given to --save")
    options.add_argument("--out", type=Path, metavar="FOLDER", help="default: report in the first folder")
    options.add_argument("--json", action="store_true", help="print the path of the page and the notes as JSON")
    known = options.parse_args(words)
    found = gather(known.folders)
    try:
        page = write(found, known.out or known.folders[0] / "report")
    except ModuleNotFoundError as error:
        raise RuntimeError(f"the report needs {error.name}: pip install 'sltt[report]'") from error
    if known.json:
        print(json.dumps({"page": str(page), "notes": found.notes}))
        return
    shown = Report()
    for note in found.notes:
        shown.warn(note)
    shown.line(f"report: {page}")


def _give(found: Any, known: argparse.Namespace, name: str, show: Callable[[Report], None]) -> None:
    """Print what a command found, as JSON or for people, and keep it where --save says."""
    from sltt.files import write_atomically

    text = as_json(found)
    if known.save:
        known.save.mkdir(parents=True, exist_ok=True)
        write_atomically(known.save / name, lambda file: file.write(text.encode()))
    if known.json:
        print(text)
        return
    report = Report()
    show(report)
    if known.save:
        report.line(f"written to {known.save / name}")


def export(words: Sequence[str]) -> None:
    """`sltt export RUN --to nir|onnx`: write a trained network for other tools."""
    from sltt.checkpoints import load_selected

    folder, words = begin(words)
    options = Options("sltt export RUN", EXPORT_HELP)
    options.add_argument("--to", required=True, choices=("nir", "onnx"))
    options.add_argument("--out", type=Path, metavar="FILE", help="default: graph.nir or step.onnx in the run")
    options.add_argument("--dt", type=float, default=1e-4, help="seconds of a time step, for NIR; default: 0.0001")
    known, run = options.parse_args(words), Path(folder)
    built = Recipe("sltt export", str(run_config(run)), []).build()
    load_selected(built.model, run)
    splits = built.data.splits(built.steps)
    x, _ = splits.collate([splits.test[0]])
    frame = x if splits.static else x[0]
    out = known.out or run / {"nir": "graph.nir", "onnx": "step.onnx"}[known.to]
    report = Report()
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


def recipes(words: Sequence[str]) -> None:
    """`sltt recipes [NAME]`."""
    options = Options("sltt recipes", "List the recipes, or print one.")
    options.add_argument("name", nargs="?", help="recipe to print")
    if name := options.parse_args(words).name:
        print(find_recipe(name).read_text(), end="")
        return
    report = Report()
    for name, path in shipped_recipes().items():
        report.line(f"{name:15} {path.read_text().splitlines()[0].removeprefix('# ')}")


def data(words: Sequence[str]) -> None:
    """`sltt data check RECIPE [OPTION ...]`: read every sample's file; an error unless the data set is whole."""
    if list(words[:1]) != ["check"] or len(words) < 2 or words[1].startswith("-"):
        raise UsageError("usage: sltt data check RECIPE [--data.root DIR] [--steps T]")
    only(words[2:], ("data", "steps"), "sltt data check", "the others do not change the data")
    parser = make_parser(f"sltt data check {words[1]}")
    built = build(parser, parse(parser, find_recipe(words[1]), words[2:]))
    splits = built.data.splits(built.steps)
    report = Report()
    for name in ("train", "validation", "test"):
        report.line(f"{name:12} {_count(getattr(splits, name)):8,} samples")
    report.line(f"{'classes':12} {splits.classes:8,}")
    report.line(f"{'split':12} {splits.fingerprint}")
    if missing := built.data.missing():
        lost = " and ".join(f"{count:,} {name} recordings" for name, count in missing.items())
        raise ValueError(f"the data set is partial: {lost} are not there; a training would use what is")
    report.line("nothing is missing")


def doctor(words: Sequence[str]) -> None:
    """`sltt doctor`."""
    from sltt.doctor import print_findings

    Options("sltt doctor", "What works on this machine, and what would make it faster.").parse_args(words)
    print_findings()


COMMANDS: dict[str, Callable[[Sequence[str]], None]] = {
    "train": train,
    "eval": evaluate_run,
    "agreement": agreement,
    "compare": compare,
    "profile": profile,
    "report": report,
    "export": export,
    "recipes": recipes,
    "data": data,
    "doctor": doctor,
}
EVAL_KEYS = (
    "model",
    "data",
    "loss",
    "steps",
    "batch_size",
    "precision",
    "channels_last",
    "workers",
    "device",
    "compile",
    "sparse",
)
PROCESSES = ("devices", "num_nodes", "strategy")
RESUME_KEYS = ("resume", *RESUMABLE)
EVAL_HELP = f"Measure a trained run. {', '.join(f'--{k}' for k in EVAL_KEYS)} override the run's configuration."

RULES = ["BPTT", "SLTT", "SLTT:k=1"]
RULES_HELP = f"default: {','.join(RULES)}"
SAVE_HELP = "keep the result in this folder, for sltt report"

AGREEMENT_HELP = (
    "Cosine and norm of the gradients of SLTT and of truncated BPTT beside that of exact BPTT, and which rule to take; "
    "where it is not SLTT, a Mixed that takes less memory, if there is one. "
    "Other options are those of sltt train: --model.…, --data.…"
)

EXPORT_HELP = (
    "Write the selected weights of a run as a NIR graph, or as an ONNX model of one time step with the states as "
    "inputs and outputs."
)

REPORT_HELP = (
    "Write one HTML page, which needs no network, with tables and figures of what sltt compare, profile and agreement "
    "kept with --save, and of training runs; beside it the figures as PNG and SVG, and the tables as CSV."
)

PROFILE_HELP = (
    "What a training iteration takes under each rule and T: memory at the peak by its parts, seconds by theirs, "
    "multiplications; and what the inference of one sample takes: synaptic operations by layer and an estimate of the "
    "energy. With --budget, what fits a memory. Other options are those of sltt train."
)

COMPARE_HELP = (
    "Train every rule with every seed, in all phases, under the recipe's budget. Print test accuracy (mean ± standard "
    "deviation), seconds for an epoch, and of one batch peak memory, multiplications and the gradient's cosine with "
    "BPTT's. Run again, it continues where it stopped. Other options are those of sltt train."
)


def _summary(model: "nn.Module") -> str:
    return f"{type(model).__name__} with {sum(p.numel() for p in model.parameters()):,} parameters"


def _count(samples: Any) -> int:
    return 0 if samples is None else len(samples)
