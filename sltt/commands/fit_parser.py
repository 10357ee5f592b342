"""The parser whose options are the arguments of `sltt.fit`, and its help."""

import argparse
import re
from dataclasses import MISSING, fields
from functools import partial
from typing import Any

import yaml
from jsonargparse import ArgumentParser, DefaultHelpFormatter, set_loader, set_parsing_settings

import sltt
from sltt.commands import yamltext
from sltt.data import Data
from sltt.data.loaders import BATCH_SIZE
from sltt.rules import SHIPPED
from sltt.training.settings import Settings, names_of, texts_of

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
  --schedule NAME            learning rate: Cosine, Linear, Constant, MultiStep
  --clip_norm NORM           scale larger gradients down to this norm
  --model NAME               DigitsNet, sltt.models.resnet18, my_networks.Net
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


class Help(argparse.RawDescriptionHelpFormatter, DefaultHelpFormatter):
    """Help that lists the same classes whatever else is imported, with short texts."""

    def _expand_help(self, action: argparse.Action) -> str:
        text = re.sub(r", known subclasses: ([^)]*)", _list_subclasses, super()._expand_help(action))
        text = re.sub(r"Show the help for the given subclass of .*", "list the arguments of a class", text)
        return re.sub(r"Print the configuration after .*", "print the settings and exit", text)


def _list_subclasses(match: re.Match[str]) -> str:
    """Return the known subclasses without those that happen to be imported, or nothing where any module fits."""
    named = [name for name in match[1].split(", ") if name.startswith(("sltt.", "torch.optim."))]
    return f", known subclasses: {', '.join(named)}" if named and "torch.nn.Module" not in match[1] else ""


def _as_class(value: Any) -> Any:
    """Return an object that was made without arguments, or a partial of a class, as a recipe has it."""
    if isinstance(value, bool | int | float | str | None):
        return value
    kind, keywords = (value.func, value.keywords) if isinstance(value, partial) else (type(value), {})
    return {"class_path": f"{kind.__module__}.{kind.__qualname__}", "init_args": keywords}


def make_parser(prog: str) -> ArgumentParser:
    """Return a parser whose options are the arguments of `sltt.fit`."""
    for name in sltt.__all__:  # pyright: ignore[reportAttributeAccessIssue]  # the parser knows a class by its name once it is imported
        getattr(sltt, name)
    set_parsing_settings(import_path_denylist=[])  # a class_path never imports what the parser's own list denies
    set_loader("sltt", yamltext.load_yaml, exceptions=(yaml.YAMLError,))
    told: Any = {"prog": prog, "usage": f"{prog} [OPTION ...]", "description": MATTER_FIRST, "formatter_class": Help}
    parser = ArgumentParser(**told, exit_on_error=False, allow_abbrev=False, parser_mode="sltt")
    parser.add_argument("--config", action="config", help="YAML file whose values override the recipe's")
    kinds = {setting.name: (setting.type, setting.default) for setting in fields(Settings)}
    kinds |= {"data": (Data, MISSING), "batch_size": (int | None, BATCH_SIZE)}  # a recipe's data is no loader
    texts = texts_of(Settings) | {"data": "the data set and its splits"}
    for name in (name for name in texts if name not in names_of(Settings, "run")):
        kind, default = kinds[name]
        # a default that is an object would not be written into the configuration of a run
        options = {"required": True} if default is MISSING else {"default": _as_class(default)}
        parser.add_argument(f"--{name}", type=kind, help=texts[name], **options)
    parser.add_argument("--run", type=str | None, help="folder of the run; default: runs/RECIPE-RULE-DATE")
    parser.add_argument("--resume", type=str | None, metavar="RUN", help="continue the run in this folder")
    return parser
