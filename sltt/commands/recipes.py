"""List the recipes, or print one."""

import textwrap
from collections.abc import Sequence

from sltt.commands import yamltext
from sltt.commands.parsing import CommandOptions, find_recipe, shipped_recipes
from sltt.training.console import Console


def options() -> CommandOptions:
    parser = CommandOptions("sltt recipes", __doc__)
    parser.add_argument("name", nargs="?", help="recipe to print")
    return parser


def run(words: Sequence[str]) -> None:
    if name := options().parse_args(words).name:
        print(yamltext.read_text(find_recipe(name)), end="")
        return
    report = Console()
    width = report.console.width if report.console.is_terminal else 1000
    for name, path in shipped_recipes().items():
        text = f"{name:20} {path.read_text(encoding='utf-8').splitlines()[0].removeprefix('# ')}"
        report.line(textwrap.fill(text, width, subsequent_indent=" " * 21))
