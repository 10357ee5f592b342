"""The parser whose options are the arguments of `sltt.fit`, and its help."""

import argparse
import inspect
import os
import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentParser, DefaultHelpFormatter, Namespace, set_loader, set_parsing_settings
from jsonargparse.typing import Path_fr

import sltt
from sltt.commands import yamltext
from sltt.commands.failures import UsageError
from sltt.data.loaders import BATCH_SIZE
from sltt.rules import SHIPPED

LISTS = "phases", "callbacks", "loggers"
*FIRST, LAST = (rule.__name__ for rule in SHIPPED)
MATTER_FIRST = f"""Options override the recipe's values. These matter first:

  --rule NAME                {", ".join(FIRST)} or {LAST}
  --rule.k K                 an argument of the rule; --rule.help SLTT lists all
  --steps T                  number of time steps
  --epochs N                 passes over the training samples
  --batch_size N             samples in a batch
  --optimizer NAME           SGD, AdamW or another of torch.optim
  --optimizer.lr RATE        learning rate
  --optimizer.weight_decay RATE
  --schedule NAME            learning rate: Cosine, Linear, Constant or Step
  --clip_norm NORM           scale larger gradients down to this norm
  --model NAME               resnet18, DigitsNet, or a class: my_networks.Net
  --model.neuron.tau TAU     membrane time constant, in time steps
  --data NAME                Digits, CIFAR10, or a class: my_data.Recordings
  --data.root DIR            where the files of the data are
  --data.validation SHARE    held out of the training samples; 0 for none
  --seed SEED                the same seed gives the same weights
  --precision bf16-mixed     mixed precision
  --device cpu|cuda|mps      default: a CUDA GPU, if there is one
  --workers N                processes that load data
  --weights RUN              start from the weights of a run
  --run FOLDER               of the run; default: runs/RECIPE-RULE-DATE
  --resume RUN               continue a run; classes of your own: --code FOLDER

A class is given by its name or import path, its arguments after a dot. All
options follow, with the recipe's values as defaults."""


class Help(DefaultHelpFormatter):
    """Lists the same classes whatever else is imported, and is short about other help."""

    def _expand_help(self, action: argparse.Action) -> str:
        text = re.sub(r", known subclasses: ([^)]*)", _list_subclasses, super()._expand_help(action))
        text = re.sub(r"Show the help for the given subclass of .*", "list the arguments of a class", text)
        return re.sub(r"Print the configuration after .*", "print the settings and exit", text)

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return text


def _list_subclasses(match: re.Match[str]) -> str:
    """The list of known subclasses without those that happen to be imported, or nothing where any module fits."""
    named = [name for name in match[1].split(", ") if name.startswith(("sltt.", "torch.optim."))]
    return f", known subclasses: {', '.join(named)}" if named and "torch.nn.Module" not in match[1] else ""


class Parser(ArgumentParser):
    """Reads files as UTF-8, whatever the locale, and leaves out their settings `without`."""

    without: Sequence[str] = ()

    def parse_args(self, args: Sequence[str], *more: Any, **named: Any) -> Namespace:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Return the configuration that the words make. A list replaces that of the words before."""
        return super().parse_args(_replace_lists(args), *more, **named)

    def parse_path(self, path: Any, *args: Any, **kwargs: Any) -> Namespace:
        with Path_fr(path).relative_path_context():  # pyright: ignore[reportCallIssue]
            text = yamltext.read(Path(Path(path).name))
            values = _load_text(Path(path).name)
            if isinstance(values, dict) and "config" in values:  # the parser would read it, without an end
                raise UsageError(
                    f"{path} has a key config: leave it out; `sltt train RECIPE --config FILE` takes a second file"
                )
            if self.without:
                values = {name: value for name, value in values.items() if name not in self.without}
                text = yaml.safe_dump(values, sort_keys=False)
            return self.parse_string(text, Path(path).name, *args, **kwargs)


def _replace_lists(words: Sequence[str]) -> list[str]:
    """The words, with `--NAME=null` before a list: in one as long as the list before, the parser keeps keys of that."""
    replacing: list[str] = []
    for word, following in zip(words, [*words, ""][1:], strict=True):
        option, _, value = (word if "=" in word else f"{word}={following}").partition("=")
        given = _load_text(value) if option == "--config" else {option.removeprefix("--"): value}
        lists = [name for name in LISTS if isinstance(given, dict) and isinstance(_load_text(given.get(name)), list)]
        replacing += [*(f"--{name}=null" for name in lists), word]
    return replacing


def _load_text(value: Any) -> Any:
    """Read a YAML file or text; return None where it cannot be read: the parser says why."""
    if not isinstance(value, str):
        return value
    try:
        path = os.path.expanduser(value)
        return yamltext.load(yamltext.read(Path(path)) if os.path.isfile(path) else value)
    except (OSError, UsageError, yaml.YAMLError):
        return None


def _as_class(value: Any) -> dict[str, Any]:
    """Return an object that was made without arguments, or a partial of a class, as a recipe has it."""
    kind, given = (value.func, value.keywords) if isinstance(value, partial) else (type(value), {})
    return {"class_path": f"{kind.__module__}.{kind.__qualname__}", "init_args": given}


def make_parser(prog: str, unread: Sequence[str] = ()) -> Parser:
    """Return a parser whose options are the arguments of `sltt.fit`; those `unread` are null, and import no class."""
    for name in sltt.__all__:  # the parser knows a class by its name once it is imported
        getattr(sltt, name)
    set_parsing_settings(import_path_denylist=[])  # a class_path never imports what the parser's own list denies
    set_loader("sltt", yamltext.load, exceptions=(yaml.YAMLError,))
    parser = Parser(
        prog=prog,
        usage=f"{prog} [OPTION ...]",
        description=MATTER_FIRST,
        exit_on_error=False,
        allow_abbrev=False,
        formatter_class=Help,
        parser_mode="sltt",
    )
    parser.add_argument("--config", action="config", help="YAML file whose values override the recipe's")
    parser.add_function_arguments(
        sltt.fit, skip={"data", "run", "resume", "config", "report", *unread}, fail_untyped=False
    )
    for name in unread:
        parser.add_argument(f"--{name}", type=lambda value: None)
    # a default that is an object would not be written into the configuration of a run
    arguments, objects = inspect.signature(sltt.fit).parameters, ("rule", "loss", "optimizer", "schedule", "metric")
    parser.set_defaults({name: _as_class(arguments[name].default) for name in objects})
    parser.set_defaults({"batch_size": BATCH_SIZE})  # a recipe's data is no loader
    parser.add_argument("--data", type=sltt.data.Data, required=True, help="the data set and its splits")
    parser.add_argument("--run", type=str | None, help="folder of the run; default: runs/RECIPE-RULE-DATE")
    parser.add_argument("--resume", type=str | None, metavar="RUN", help="continue the run in this folder")
    return parser
