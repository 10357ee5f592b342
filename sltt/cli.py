"""The command line: `sltt train`, `sltt eval`, `sltt recipes`, `sltt data`, `sltt doctor`."""

import argparse
import difflib
import hashlib
import importlib
import inspect
import json
import os
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from sltt.progress import Report, megabytes

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace
    from torch import nn

USAGE = """usage: sltt COMMAND ...

  sltt train [RECIPE] [OPTION ...]   train a recipe (default: digits), or a YAML file of your own
  sltt eval RUN [OPTION ...]         measure a trained run on its test samples
  sltt agreement [RECIPE] [OPTION …] how near SLTT's gradient is to that of BPTT: --taus --steps --at-epochs
  sltt compare [RECIPE] [OPTION …]   train several rules under the same budget: --rules BPTT,SLTT,SLTT:k=1
  sltt recipes [NAME]                list the recipes, or print one
  sltt data check RECIPE [OPTION …]  whether a recipe's data is whole: --data.root DIR
  sltt doctor                        what works on this machine, and what would make it faster

`sltt train RECIPE --help` explains every option, with the recipe's values.
"""


class UsageError(Exception):
    """The command line cannot be understood; the message says why."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0, 1 for a run that failed, 2 for wrong usage, 130 for Ctrl-C."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or words[0] in ("-h", "--help"):
        print(USAGE, end="")
        return 0 if words else 2
    command, *rest = words
    try:
        if command not in COMMANDS:
            raise UsageError(f"unknown command {command!r}{_nearest(command, COMMANDS)}")
        COMMANDS[command](rest)
    except KeyboardInterrupt as stop:
        print(f"sltt: {stop or 'stopped by Ctrl-C'}", file=sys.stderr)
        return 130
    except UsageError as error:
        print(f"sltt: {error}", file=sys.stderr)
        return 2
    except (ValueError, OSError, ArithmeticError, RuntimeError) as error:
        if os.environ.get("SLTT_TRACEBACK"):
            raise
        for line in (error, *getattr(error, "__notes__", ())):
            print(f"sltt: {line}", file=sys.stderr)
        print("sltt: set SLTT_TRACEBACK=1 to see where this happened", file=sys.stderr)
        return 1
    return 0


def train(words: Sequence[str]) -> None:
    """`sltt train [RECIPE] [OPTION ...]`: train, then measure the selected weights on the test samples."""
    from sltt.checkpoints import write_atomically
    from sltt.runs import find_checkpoint, new_run
    from sltt.train import evaluate, fit

    named = bool(words) and not words[0].startswith("-")
    resumed = _resumed(words)
    if resumed and named:
        raise UsageError(f"--resume continues {resumed} with its own recipe: leave out {words[0]!r}")
    source = run_config(resumed) if resumed else find_recipe(words[0] if named else "digits")
    if resumed:
        _only(words, RESUME_KEYS, "sltt train --resume", "a run continues with its own settings")
    parser = _parser(f"sltt train {words[0] if named else '[RECIPE]'}")
    config = _parse(parser, source, words[named:])
    folder = config.pop("run")
    config.pop("resume")
    built = _build(parser, config)
    splits = built.data.splits(built.steps)  # before a folder is made: it fails where there is no data
    name = f"{source.stem}-{type(built.rule).__name__.lower()}"
    run = resumed or new_run(folder, name)

    report = Report()
    report.line(f"{'continuing' if resumed else 'run'} {run}")
    report.line(f"{_summary(built.model)}, {built.rule}, T = {built.steps}")
    counts = ", ".join(f"{_count(getattr(splits, n))} {n}" for n in ("train", "validation", "test"))
    report.line(f"samples: {counts} (split {splits.fingerprint})")
    resolved = yaml.safe_load(parser.dump(config))
    result = fit(**vars(built), run=run, resume=True, config=resolved, report=report)  # its folder is there already
    selected = evaluate(built.model, built.data, **_evaluation(built))
    _load(built.model, find_checkpoint(run, "last"))
    last = evaluate(built.model, built.data, **_evaluation(built))
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
    from sltt.runs import find_checkpoint
    from sltt.train import evaluate

    options = argparse.ArgumentParser("sltt eval", description=EVAL_HELP, allow_abbrev=False)
    options.add_argument("run", type=Path, help="folder of a trained run")
    options.add_argument("--checkpoint", choices=("best", "last"), help="default: best, or last without validation")
    options.add_argument("--split", choices=("test", "validation", "train"), default="test")
    options.add_argument("--json", action="store_true", help="print JSON")
    known, overrides = options.parse_known_args(words)
    _only(overrides, EVAL_KEYS, "sltt eval", "the others belong to the training")
    parser = _parser("sltt eval")
    config = _parse(parser, run_config(known.run), overrides)
    built = _build(parser, config)
    path = find_checkpoint(known.run, known.checkpoint)
    _load(built.model, path)
    metrics = evaluate(built.model, built.data, known.split, **_evaluation(built))
    if known.json:
        print(json.dumps({"checkpoint": str(path), "split": known.split, **vars(metrics)}))
        return
    report = Report()
    report.line(f"{path}, T = {built.steps}, {known.split} samples")
    report.line(f"accuracy     {metrics.accuracy:.2%}")
    report.line(f"loss         {metrics.loss:.4f}")
    report.line(f"firing rate  {metrics.firing_rate:.4f}")
    report.line(f"seconds      {metrics.seconds:.1f}")
    report.line(f"peak memory  {megabytes(metrics.peak_memory)}")


def agreement(words: Sequence[str]) -> None:
    """`sltt agreement [RECIPE] [OPTION ...]`: the gradients of SLTT and truncated BPTT beside that of exact BPTT."""
    import torch

    from sltt.evidence import agreement_json, measure_agreement, print_agreement

    options = argparse.ArgumentParser("sltt agreement", description=AGREEMENT_HELP, allow_abbrev=False)
    options.add_argument("recipe", nargs="?", default="digits", help="default: digits")
    options.add_argument(
        "--taus", type=_numbers(float), help="time constants of the LIF neurons; default: the recipe's"
    )
    options.add_argument("--steps", type=_numbers(int), help="numbers of time steps; default: the recipe's")
    options.add_argument("--at-epochs", type=_numbers(int), default=[0], help="after so many epochs of training each")
    options.add_argument("--samples", type=int, default=128, help="training samples in the batch that is measured")
    options.add_argument("--float64", action="store_true", help="compute in float64, where no spike flips by rounding")
    options.add_argument("--json", action="store_true", help="print JSON")
    known, overrides = options.parse_known_args(words)
    parser = _parser("sltt agreement")
    source = find_recipe(known.recipe)
    config = _parse(parser, source, overrides)
    for key in ("run", "resume", "weights"):
        config.pop(key)
    built = _build(parser, config)

    def make_model() -> "nn.Module":
        return _build(parser, _parse(parser, source, overrides)).model

    rows = measure_agreement(
        built,
        make_model,
        known.taus or [None],
        known.steps or [built.steps],
        known.at_epochs,
        known.samples,
        torch.float64 if known.float64 else None,
        Report(quiet=known.json),
    )
    if known.json:
        print(agreement_json(rows))
    else:
        print_agreement(rows, Report())


def compare(words: Sequence[str]) -> None:
    """`sltt compare [RECIPE] [OPTION ...]`: train every rule with every seed, and print one table."""
    from sltt.checkpoints import write_atomically
    from sltt.evidence import compare, compared_json, print_compared

    options = argparse.ArgumentParser("sltt compare", description=COMPARE_HELP, allow_abbrev=False)
    options.add_argument("recipe", nargs="?", default="digits", help="default: digits")
    options.add_argument("--rules", type=_numbers(str), default=["BPTT", "SLTT", "SLTT:k=1"], help="BPTT,SLTT,SLTT:k=1")
    options.add_argument("--seeds", type=int, default=1, help="number of seeds; default: 1")
    options.add_argument(
        "--folder", type=Path, help="of the runs; default: runs/compare-RECIPE, and a mark of the options"
    )
    options.add_argument("--json", action="store_true", help="print JSON")
    known, overrides = options.parse_known_args(words)
    parser, source = _parser("sltt compare"), find_recipe(known.recipe)
    # other options are another comparison
    mark = f"-{hashlib.sha256(repr(overrides).encode()).hexdigest()[:6]}" if overrides else ""
    folder = known.folder or Path("runs") / f"compare-{source.stem}{mark}"

    def build(more: list[str]) -> "Namespace":
        config = _parse(parser, source, [*overrides, *more])
        config.pop("run")
        config.pop("resume")
        return _build(parser, config)

    build([])  # an option that is wrong ends this before a training begins
    report = Report(quiet=known.json)
    found = compare(known.rules, known.seeds, folder, build, report)
    write_atomically(folder / "compare.json", lambda file: file.write(compared_json(found).encode()))
    if known.json:
        print(compared_json(found))
    else:
        print_compared(found, report)
        report.line(f"written to {folder}")
    if died := [f"{one.rule}, {error}" for one in found for error in one.errors]:
        raise RuntimeError(f"{len(died)} runs died; the same command tries them again: {'; '.join(died)}")


def recipes(words: Sequence[str]) -> None:
    """`sltt recipes [NAME]`."""
    options = argparse.ArgumentParser("sltt recipes", description="List the recipes, or print one.")
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
    _only(words[2:], ("data", "steps"), "sltt data check", "the others do not change the data")
    parser = _parser(f"sltt data check {words[1]}")
    built = _build(parser, _parse(parser, find_recipe(words[1]), words[2:]))
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

    description = "What works on this machine, and what would make it faster."
    argparse.ArgumentParser("sltt doctor", description=description).parse_args(words)
    print_findings()


COMMANDS: dict[str, Callable[[Sequence[str]], None]] = {
    "train": train,
    "eval": evaluate_run,
    "agreement": agreement,
    "compare": compare,
    "recipes": recipes,
    "data": data,
    "doctor": doctor,
}
EVAL_KEYS = ("model", "data", "loss", "steps", "batch_size", "precision", "workers", "device", "compile")
RESUME_KEYS = ("resume", "epochs", "data", "workers", "device", "compile", "checkpoint_minutes")
EVAL_HELP = f"Measure a trained run. {', '.join(f'--{k}' for k in EVAL_KEYS)} override the run's configuration."

AGREEMENT_HELP = (
    "Cosine and norm of the gradients of SLTT and of truncated BPTT beside that of exact BPTT, and which rule to take. "
    "Other options are those of sltt train: --model.…, --data.…"
)

COMPARE_HELP = (
    "Train every rule with every seed under the recipe's budget, and print test accuracy (mean ± standard deviation), "
    "seconds for an epoch, and of one batch peak memory, multiplications, and the cosine of the gradient with BPTT's. "
    "Run again, it continues where it stopped. Other options are those of sltt train."
)


def shipped_recipes() -> dict[str, Path]:
    """The recipes in the package, by name."""
    folder = Path(str(files("sltt") / "recipes"))
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def find_recipe(name: str) -> Path:
    """The file of a shipped recipe, or a YAML file of the user's own."""
    known = shipped_recipes()
    if name in known:
        return known[name]
    if name.endswith((".yaml", ".yml")):
        if Path(name).is_file():
            return Path(name)
        raise UsageError(f"no file {name}")
    raise UsageError(f"unknown recipe {name!r}{_nearest(name, known)}; `sltt recipes` lists them")


def run_config(run: Path) -> Path:
    """The configuration of a run."""
    from sltt.runs import CONFIG

    if not (run / CONFIG).is_file():
        raise UsageError(f"{run} is not the folder of a run: there is no {CONFIG}")
    return run / CONFIG


def _parser(prog: str) -> "ArgumentParser":
    """A parser whose options are the arguments of `sltt.fit`."""
    from jsonargparse import ArgumentParser, DefaultHelpFormatter, set_parsing_settings

    import sltt

    set_parsing_settings(import_path_denylist=[])  # a class_path never imports what the parser's own list denies

    class Help(DefaultHelpFormatter):
        """Leaves out the hundreds of modules of PyTorch where any module fits."""

        def _expand_help(self, action: argparse.Action) -> str:
            return re.sub(r", known subclasses: torch\.nn\.Module,[^)]*", "", super()._expand_help(action))

    parser = ArgumentParser(
        prog=prog,
        description="Options override the recipe's values, which are shown as defaults. A class is given by its name "
        "or import path, its arguments after a dot: --rule SLTT --rule.k 2; --rule.help SLTT explains them.",
        exit_on_error=False,
        formatter_class=Help,
    )
    parser.add_argument("--config", action="config", help="YAML file whose values override the recipe's")
    parser.add_function_arguments(sltt.fit, skip={"run", "resume", "config", "report"}, fail_untyped=False)
    parser.add_argument("--run", type=str | None, help="folder of the run; default: runs/RECIPE-RULE-DATE")
    parser.add_argument("--resume", type=str | None, metavar="RUN", help="continue the run in this folder")
    return parser


def _parse(parser: "ArgumentParser", source: Path, words: Sequence[str]) -> "Namespace":
    """The configuration in `source` with the options in `words` over it; raises UsageError with the nearest name."""
    try:
        if {"-h", "--help"} & set(words):
            parser.set_defaults(yaml.safe_load(source.read_text()))  # so that the help shows the recipe's values
        config = parser.parse_args(["--config", str(source), *words])
    except argparse.ArgumentError as error:
        raise UsageError(_explain(str(error))) from None
    config.pop("config")
    return config


def _build(parser: "ArgumentParser", config: "Namespace") -> "Namespace":
    """Make the objects that a configuration names, seeded so that the same configuration gives the same weights."""
    from sltt.train import seed_everything

    seed_everything(config.seed)
    return parser.instantiate(config)


def _load(model: "nn.Module", path: Path) -> None:
    from sltt.checkpoints import load_checkpoint, load_weights

    load_weights(model, load_checkpoint(path), path)


def _evaluation(built: "Namespace") -> dict[str, Any]:
    """The arguments that `sltt.fit` and `sltt.evaluate` share."""
    return {key: built[key] for key in EVAL_KEYS if key not in ("model", "data")}


def _numbers(kind: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    """A parser of numbers separated by commas."""

    def numbers(text: str) -> list[Any]:
        return [kind(part) for part in text.split(",")]

    return numbers


def _only(words: Sequence[str], keys: Sequence[str], command: str, why: str) -> None:
    """Raise UsageError for an option that would do nothing, or harm."""
    for word in words:
        if word.startswith("--") and re.split("[.=]", word.removeprefix("--"))[0] not in (*keys, "help"):
            raise UsageError(f"{command} does not take {word}: {why}; it takes {', '.join(f'--{k}' for k in keys)}")


def _resumed(words: Sequence[str]) -> Path | None:
    """The value of --resume: it names the configuration that the other options are read on top of."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--resume", type=Path)
    return parser.parse_known_args(words)[0].resume


def _explain(message: str) -> str:
    """An error of the parser, with the nearest valid name where one is not known."""
    if option := re.search(r"unrecognized arguments: --([^\s.=]+)", message):
        return f"unknown option --{option[1]}{_nearest(option[1], _fit_arguments(), '--')}"
    if key := re.search(r"Option '([^']+)' is not accepted", message):
        owners = re.findall(r"class_path[ =]'([\w.]+)'", message)
        owner = _locate(owners[-1]) if owners else None
        names = list(inspect.signature(owner).parameters) if owner else _fit_arguments()
        return f"unknown key {key[1]!r}{f' of {owners[-1]}' if owners else ''}{_nearest(key[1], names)}"
    if name := re.search(r"Expected a dot import path string: (\S+)", message):
        paths = {path.rpartition(".")[2]: path for path in _class_paths()}
        near = difflib.get_close_matches(name[1], paths, 1)
        return f"unknown class {name[1]!r}" + (f"; did you mean {paths[near[0]]}?" if near else "")
    key = ".".join(re.findall(r'Parser key "([^"]+)"', message))
    kinds = re.findall(
        r"Expected an? (?:<class '|typing\.Literal)?(.+?)(?:'>)?(?:\. Got value|$)", message, re.MULTILINE
    )
    value = re.search(r"(?:Given|Got) value: (.*)\Z", message)
    return f"{key}: expected {' or '.join(kinds)}, got {value[1]}" if key and kinds and value else message


def _fit_arguments() -> list[str]:
    import sltt

    return [*inspect.signature(sltt.fit).parameters, "run", "resume", "config"]


def _class_paths() -> list[str]:
    """The import paths of what this package offers to recipes."""
    import sltt

    modules = (sltt.models, sltt.data, sltt.losses, sltt.schedules, sltt.surrogates, sltt)
    return [f"{m.__name__}.{name}" for m in modules for name, value in vars(m).items() if callable(value)]


def _locate(path: str) -> Any:
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)


def _nearest(name: str, known: Iterable[str], prefix: str = "") -> str:
    near = difflib.get_close_matches(name, list(known), 1)
    return f"; did you mean {prefix}{near[0]}?" if near else ""


def _summary(model: "nn.Module") -> str:
    return f"{type(model).__name__} with {sum(p.numel() for p in model.parameters()):,} parameters"


def _count(samples: Any) -> int:
    return 0 if samples is None else len(samples)
