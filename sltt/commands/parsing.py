"""Options of the command line: recipes, what overrides their values, and errors that name the nearest word."""

import argparse
import difflib
import itertools
import json
import os
import re
import sys
from collections.abc import Callable, Sequence
from importlib.resources import files
from pathlib import Path
from shlex import quote
from typing import Any, NoReturn

import numpy as np
import torch
import yaml
from jsonargparse import ArgumentParser, Namespace

from sltt.commands import yamltext
from sltt.commands.failures import UsageError
from sltt.commands.fit_parser import make_parser
from sltt.commands.hints import explain, fit_arguments, suggest
from sltt.commands.rule_texts import rule_options, rules
from sltt.models.base import SHIPPED
from sltt.parallel.devices import count_started
from sltt.training.average import select_weights
from sltt.training.batches import seed_everything
from sltt.training.checkpoints import load_best, load_weights, start_from
from sltt.training.files import CONFIG
from sltt.training.named import check_named
from sltt.training.runs import MADE_IN, is_run, load_call, read_config
from sltt.training.sample import SAMPLE
from sltt.training.settings import Settings, names_of
from sltt.training.trained import Trained

LISTS = "phases", "callbacks", "loggers"
RULES = ["BPTT", "SLTT", "SLTT:k=1"]
ANY_PROCESSES = ["--devices=null"]  # of a run that is measured: not those of its training


class CommandOptions(argparse.ArgumentParser):
    """The options that a command has by itself. Raises UsageError, with what a type's ValueError says."""

    def __init__(self, prog: str, description: str | None):
        self.own: list[str] = []
        super().__init__(prog, description=description, allow_abbrev=False)

    def add_argument(self, *names: str, **settings: Any) -> argparse.Action:
        """Take an option."""
        self.own += names
        if kind := settings.get("type"):
            settings["type"] = _tell_error(kind)
        return super().add_argument(*names, **settings)

    def add_rules(self) -> None:
        """Take --rules."""
        self.add_argument("--rules", type=rules, default=RULES, help=f"default: {','.join(RULES)}")

    def add_checkpoint(self) -> None:
        """Take --checkpoint."""
        text = "default: best, or last without validation"
        self.add_argument("--checkpoint", choices=("best", "last"), help=text)

    def add_code(self) -> None:
        """Take --code."""
        text = "take your classes that the run names from this folder too: --code ."
        self.add_argument("--code", type=Path, metavar="FOLDER", help=text)

    def add_output(self, folder: str = "keep the result in this folder, for sltt report") -> None:
        """Take --json and --save, which `results.give` obeys."""
        self.add_argument("--json", action="store_true", help="print JSON")
        self.add_argument("--save", type=new_folder, metavar="FOLDER", help=folder)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Return the command's own options, and the words left over; raise UsageError for a misspelt option."""
        arguments, rest = super().parse_known_args(args, namespace)
        trains = [f"--{name}" for name in fit_arguments()]
        for name in (re.split("[.=]", word)[0] for word in rest if word.startswith("--")):
            near = difflib.get_close_matches(name, [*trains, *self.own], 1)
            if name not in trains and near and near[0] in self.own:
                raise UsageError(f"unknown option {name}; did you mean {near[0]}?")
        return arguments, rest

    def parse_recipe(self, words: Sequence[str], default: str = "digits") -> "tuple[Any, Recipe]":
        """Return the command's own options, and the recipe that the words begin with, under the other options."""
        name, words = begin(words, default)
        arguments, overrides = self.parse_known_args(words)
        return arguments, Recipe(self.prog.removesuffix(" [RECIPE]"), name, overrides)

    def error(self, message: str) -> NoReturn:
        """Say what is wrong with the options."""
        raise UsageError(message)


def _tell_error(kind: Callable[[str], Any]) -> Callable[[str], Any]:
    """Return the type of an option, whose ValueError is shown as it is."""

    def convert(text: str) -> Any:
        try:
            return kind(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return convert


def shipped_recipes() -> dict[str, Path]:
    """Return the recipes in the package, by name."""
    folder = Path(str(files("sltt") / "recipes"))
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def find_recipe(name: str) -> Path:
    """Return the file of a recipe: a shipped one, or a user's own, which may name classes of the working directory."""
    if not sys.flags.safe_path:
        take_code(Path())
    recipes = shipped_recipes()
    if name in recipes:
        return recipes[name]
    if name.endswith((".yaml", ".yml")):
        if Path(name).is_file():
            return Path(name)
        raise UsageError(f"there is no file {name}; `sltt recipes NAME > {name}` copies a recipe")
    if name and Path(name).is_dir():
        raise UsageError(f"{name} is a folder, and no recipe: `sltt train --resume {quote(name)}` continues a run")
    raise UsageError(f"unknown recipe {name!r}{suggest(name, recipes)}; `sltt recipes` lists them")


def take_code(folder: Path) -> None:
    """Append a folder to `sys.path`: the last of all, so that no file of it replaces an installed package.

    Modules import others beside them, and so do the workers of a data loader.
    """
    if (path := str(folder.resolve())) not in map(os.path.realpath, sys.path):
        sys.path.append(path)


def run_folder(name: str | Path) -> Path:
    """Return the folder or the file of a run, or of a network of the package; raise UsageError where it is none."""
    name = name if Path(name).exists() else SHIPPED.get(str(name), name)
    if not (is_run(Path(name)) or Path(name).is_file()):
        raise UsageError(f"{name} is not the folder of a run, as a training prints it: it has no {CONFIG}")
    return Path(name)


def build_run(
    command: str,
    run: Path,
    words: Sequence[str],
    code: Path | None,
    checkpoint: dict[str, Any] | None,
    unread: Sequence[str] = (),
) -> Settings:
    """Make what the settings of a run name, under the options in `words`; return its settings.

    Settings in `unread` are not read from the run. Code comes from sltt, from the packages that it works with, and
    from the folder `code`, never from the run.

    Raises ValueError for settings that are damaged, not those of the checkpoint, or name other code.
    """
    parser, settings = make_parser(command), read_config(run, checkpoint)
    if not settings or MADE_IN in settings:
        raise ValueError(
            f"{run} was made in Python, and does not keep its network and data: {load_call(run, settings)} gives "
            f"what evaluate, predict, to_c and to_onnx take; sltt.fit(…, run={str(run)!r}, resume=True) goes on"
        )
    if code is not None:
        if not code.is_dir():
            raise UsageError(f"--code {code} is no folder: name the one with the code of the run's classes")
        take_code(code)
    settings = {name: setting for name, setting in settings.items() if name not in unread}
    check_named(run, settings, code)
    return build(parser, parse(parser, settings, words))


def load_run(
    command: str, name: str, code: Path | None, which: str | None = None, words: Sequence[str] = ()
) -> tuple[Settings, Path, dict[str, Any]]:
    """Make what a run trained, with the weights of a checkpoint; return it, the checkpoint's path and content."""
    run = run_folder(name)
    path, content = load_best(run, which)
    trained = Trained(**content["task"])
    words = [f"--steps={trained.steps}", *words, *ANY_PROCESSES]  # of phases, that of the weights
    built = build_run(command, run, words, code, content, names_of(Settings, "watchers"))
    load_weights(built.model, select_weights(content), path)
    built.model.trained = trained  # pyright: ignore[reportArgumentType]
    built.dataset.statistics = content["statistics"]
    if (sample := run / SAMPLE).exists():
        with np.load(sample) as arrays:
            content["sample"] = {name: torch.from_numpy(arrays[name]) for name in arrays.files if "." not in name}
    return built, path, content


class Recipe:
    """A recipe with options over it, of a command that takes them."""

    def __init__(self, command: str, name: str, overrides: Sequence[str]):
        for own in ("--run", "--resume"):
            if _names(overrides, own):
                raise UsageError(f"{command} takes no {own}: it works on a recipe; `sltt train` takes it")
        self.source = find_recipe(name)
        self.name = self.source.stem
        self.overrides = overrides
        self._parser = make_parser(command)

    def build(self, *more: str, rule: str | None = None) -> Settings:
        """Make the arguments of `sltt.fit`, in one process, with the weights that training starts from.

        `rule` takes the place of the recipe's, in phases too.
        """
        built = build(self._parser, self._parse(more, rule))
        if (built.devices or 1) > 1 or count_started() != (1, 1):
            raise UsageError(f"{self._parser.prog} runs in one process: start one, without --devices")
        start_from(built.model, built.weights, built.strict)
        return built

    def resolve(self, *more: str, rule: str | None = None) -> dict[str, Any]:
        """Return the configuration that `build` builds, as a run keeps it."""
        return resolve(self._parser, self._parse(more, rule))

    def _parse(self, more: Sequence[str], rule: str | None) -> Namespace:
        words = [*self.overrides, *more]
        if rule is None:
            return parse(self._parser, self.source, words)
        if _names(words, "--rule"):
            raise UsageError("--rules names the rules here: leave --rule out, or write --rules instead")
        kind, name, *settings = rule_options(rule)
        # without the recipe's rule, whose arguments one of the same class would keep
        config = parse(self._parser, self.source, [kind, name, *words, *settings], without=["rule"])
        for phase in config.phases or ():
            phase.rule = None
        return config


def refuse_seed(words: Sequence[str]) -> None:
    """Raise UsageError for --seed where the seeds are counted."""
    if _names(words, "--seed"):
        raise UsageError("the seeds are 0, 1, …: leave --seed out; --seeds says how many")


def _names(words: Sequence[str], option: str) -> bool:
    """Return whether an option is among the words."""
    return any(word.split("=")[0] == option for word in words)


def parse(
    parser: ArgumentParser, source: Path | dict[str, Any], words: Sequence[str], without: Sequence[str] = ()
) -> Namespace:
    """Return the configuration in `source`, `without` some settings, and with the options in `words` over it.

    Raises UsageError with the nearest name.
    """
    values = _read(source) if isinstance(source, Path) else source
    values = {name: value for name, value in values.items() if name not in without}
    try:
        if {"-h", "--help"} & set(words):
            parser.set_defaults(values)  # so that the help shows the recipe's values
        config = parser.parse_args(_empty_lists(words), namespace=parser.parse_object(values))
    except argparse.ArgumentError as error:
        raise UsageError(re.sub(r"\bNone(Type)?\b", "null", explain(str(error), values))) from None
    config.pop("config")
    if (phases := config.phases) and all(phase.lr is not None for phase in phases):
        for word in words:
            if re.match(r"--optimizer(\.init_args)?\.lr(=|$)", word):
                raise UsageError("every phase has an lr of its own: --optimizer.lr changes nothing, set it in --phases")
    return config


def _empty_lists(words: Sequence[str]) -> list[str]:
    """Return the words, with `--NAME=null` before a list: else the parser would keep keys of the list before."""
    emptied = []
    for word, after in itertools.zip_longest(words, words[1:], fillvalue=""):
        option, equals, value = word.partition("=")
        names = _read(value if equals else after) if option == "--config" else [option.removeprefix("--")]
        emptied += [*(f"--{name}=null" for name in LISTS if name in names), word]
    return emptied


def _read(source: Path | str) -> dict[str, Any]:
    """Return the values of a recipe, or of the file or text of --config."""
    file = os.path.expanduser(source)
    try:
        values = yamltext.load_yaml(yamltext.read_text(Path(file)) if os.path.isfile(file) else str(source))
    except yaml.YAMLError as error:
        raise UsageError(f"{source} cannot be read: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        what = "holds" if os.path.isfile(file) else "is no file, and holds"
        raise UsageError(f"{source} {what} no options: expected lines such as `epochs: 20`; `sltt recipes digits`")
    return values


def build(parser: ArgumentParser, config: Namespace) -> Settings:
    """Make the settings of a configuration, seeded so that the same configuration gives the same weights."""
    seed_everything(config.seed)
    try:
        arguments: dict[str, Any] = vars(parser.instantiate(config))
    except ValueError as error:  # of a phase, the parser tells what it tried instead
        if reasons := re.findall(r"^  - (?!Expected)(.*)$", str(error), re.MULTILINE):
            raise ValueError(reasons[0]) from error
        raise
    arguments |= {"resume": False, "config": resolve(parser, config)}  # resume is a folder here
    return Settings(**arguments)


def resolve(parser: ArgumentParser, config: Namespace) -> dict[str, Any]:
    """Return a configuration as a run keeps it: plain values, without the folder."""
    values = json.loads(parser.dump(config, format="json", skip_unset=False, skip_validation=True))
    return {name: value for name, value in values.items() if name not in ("run", "resume")}


def allow_only(words: Sequence[str], keys: Sequence[str], command: str, why: str) -> None:
    """Raise UsageError for an option that would do nothing, or harm."""
    for word in words:
        if word.startswith("--") and re.split("[.=]", word.removeprefix("--"))[0] not in (*keys, "help"):
            raise UsageError(f"{command} does not take {word}: {why}; it takes {', '.join(f'--{k}' for k in keys)}")


def begin(words: Sequence[str], default: str | None = None) -> tuple[str, Sequence[str]]:
    """Return the recipe or the run that options begin with, and the options after it."""
    if words and not words[0].startswith("-"):
        return words[0], words[1:]
    if default is None and not {"-h", "--help"} & set(words):
        raise UsageError("expected the folder of a run before the options, such as runs/RUN")
    return default or "", words


def numbers(kind: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    """Return a parser of numbers separated by commas."""
    return lambda text: [kind(part) for part in text.split(",")]


def count(text: str) -> int:
    """Return a whole number of at least 1."""
    if not text.isdecimal() or not int(text):
        raise ValueError(f"expected a whole number of at least 1, got {text!r}")
    return int(text)


def new_folder(text: str) -> Path:
    """Return the path of a folder that is there, or can be made: no file stands in its place."""
    existing = next(path for path in (Path(text), *Path(text).absolute().parents) if path.exists())
    if not existing.is_dir():
        raise ValueError(f"expected a folder to write to, and {existing} is a file: choose another")
    return Path(text)


def parse_resume(words: Sequence[str]) -> tuple[Path | None, Path | None, Sequence[str]]:
    """Return the values of --resume, on whose settings the other options are read, and of --code."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--resume", type=Path, nargs="?")  # without a value, the whole parser says so
    if (run := parser.parse_known_args(words)[0].resume) is None:
        return None, None, words
    parser.add_argument("--code", type=Path)
    args, words = parser.parse_known_args(words)
    return run, args.code, words
