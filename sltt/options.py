"""Options of the command line: recipes, what overrides their values, and errors that name the nearest word."""

import argparse
import difflib
import importlib
import inspect
import itertools
import json
import re
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace


class UsageError(Exception):
    """The command line cannot be understood; the message says why."""


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
    raise UsageError(f"unknown recipe {name!r}{nearest(name, known)}; `sltt recipes` lists them")


def run_config(run: Path) -> Path:
    """The configuration of a run."""
    from sltt.runs import CONFIG

    if not (run / CONFIG).is_file():
        raise UsageError(f"{run} is not the folder of a run: there is no {CONFIG}")
    return run / CONFIG


class Recipe:
    """A recipe with options over it.

    Args:
        command: the command that takes the options, for its help.
        name: of the recipe, or of a YAML file.
        overrides: options.
    """

    def __init__(self, command: str, name: str, overrides: Sequence[str]):
        self.source = find_recipe(name)
        self.name = self.source.stem
        self.overrides = overrides
        self._parser = make_parser(command)

    def build(self, more: Sequence[str] = ()) -> "Namespace":
        """Make the objects, with further options: the arguments of `sltt.fit`, in one process."""
        from sltt.devices import started

        built = build(self._parser, self._parse(more))
        if (built.devices or 1) * (built.num_nodes or 1) > 1 or started() != (1, 1):
            raise UsageError(f"{self._parser.prog} runs in one process: start one, without --devices and --num_nodes")
        return built

    def resolved(self, more: Sequence[str] = ()) -> dict[str, Any]:
        """The configuration that `build` builds, as a run keeps it."""
        return yaml.safe_load(self._parser.dump(self._parse(more)))

    def _parse(self, more: Sequence[str]) -> "Namespace":
        config = parse(self._parser, self.source, [*self.overrides, *more])
        config.pop("run")
        config.pop("resume")
        return config


def make_parser(prog: str) -> "ArgumentParser":
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


def parse(parser: "ArgumentParser", source: Path, words: Sequence[str]) -> "Namespace":
    """The configuration in `source` with the options in `words` over it; raises UsageError with the nearest name."""
    try:
        if {"-h", "--help"} & set(words):
            parser.set_defaults(yaml.safe_load(source.read_text()))  # so that the help shows the recipe's values
        config = parser.parse_args(["--config", str(source), *words])
    except argparse.ArgumentError as error:
        raise UsageError(_explain(str(error))) from None
    config.pop("config")
    return config


def build(parser: "ArgumentParser", config: "Namespace") -> "Namespace":
    """Make the objects that a configuration names, seeded so that the same configuration gives the same weights."""
    from sltt.train import seed_everything

    seed_everything(config.seed)
    return parser.instantiate(config)


def only(words: Sequence[str], keys: Sequence[str], command: str, why: str) -> None:
    """Raise UsageError for an option that would do nothing, or harm."""
    for word in words:
        if word.startswith("--") and re.split("[.=]", word.removeprefix("--"))[0] not in (*keys, "help"):
            raise UsageError(f"{command} does not take {word}: {why}; it takes {', '.join(f'--{k}' for k in keys)}")


def numbers(kind: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    """A parser of numbers separated by commas."""

    def parsed(text: str) -> list[Any]:
        return [kind(part) for part in text.split(",")]

    return parsed


def rules(text: str) -> list[str]:
    """Rules separated by commas, such as SLTT:k=1 or Mixed:windows={features.2: all, features.5: 4}."""
    return _split(text, ",")


def rule_options(text: str) -> list[str]:
    """The options of `sltt train` for one of `rules`; raises ValueError if it is not understood."""
    name, *settings = _split(text, ":")
    if not name or any("=" not in setting for setting in settings):
        raise ValueError(f"expected a rule such as BPTT, SLTT:k=1 or TBPTT:window=4, got {text!r}")
    pairs = [setting.split("=", 1) for setting in settings]
    return ["--rule", name, *itertools.chain.from_iterable((f"--rule.{key}", value) for key, value in pairs)]


def mixed_options(windows: Mapping[str, int | str]) -> str:
    """What to write after `sltt train` for a `Mixed`: --rule Mixed --rule.windows '{features.2: all}'."""
    # unquoted, YAML reads names such as 2 or on as something else than text
    names = [name if re.fullmatch(r"[A-Za-z_]\w*(\.\w+)+", name) else json.dumps(name) for name in windows]
    listed = ", ".join(f"{name}: {window}" for name, window in zip(names, windows.values(), strict=True))
    return f"--rule Mixed --rule.windows {shlex.quote(f'{{{listed}}}')}"


def _split(text: str, separator: str) -> list[str]:
    """Split, but not within braces."""
    return re.split(rf"{separator}(?![^{{]*}})", text)


def resumed(words: Sequence[str]) -> Path | None:
    """The value of --resume: it names the configuration that the other options are read on top of."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--resume", type=Path)
    return parser.parse_known_args(words)[0].resume


def _explain(message: str) -> str:
    """An error of the parser, with the nearest valid name where one is not known."""
    if option := re.search(r"unrecognized arguments: --([^\s.=]+)", message):
        return f"unknown option --{option[1]}{nearest(option[1], _fit_arguments(), '--')}"
    if key := re.search(r"Option '([^']+)' is not accepted", message):
        owners = re.findall(r"class_path[ =]'([\w.]+)'", message)
        owner = locate(owners[-1]) if owners else None
        names = list(inspect.signature(owner).parameters) if owner else _fit_arguments()
        return f"unknown key {key[1]!r}{f' of {owners[-1]}' if owners else ''}{nearest(key[1], names)}"
    if name := re.search(r"Expected a dot import path string: (\S+)", message):
        paths = {path.rpartition(".")[2]: path for path in _class_paths()}
        near = difflib.get_close_matches(name[1], paths, 1)
        return f"unknown class {name[1]!r}" + (f"; did you mean {paths[near[0]]}?" if near else "")
    key = ".".join(re.findall(r'Parser key "([^"]+)"', message))
    if package := re.search(r"No module named '(\w+)'", message):
        return f"{key}: no package {package[1]} is installed; if the name is right: pip install {package[1]}"
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


def locate(path: str) -> Any:
    """What an import path names."""
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)


def nearest(name: str, known: Iterable[str], prefix: str = "") -> str:
    near = difflib.get_close_matches(name, list(known), 1)
    return f"; did you mean {prefix}{near[0]}?" if near else ""
