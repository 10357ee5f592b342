"""`sltt recipes`: list the recipes, or print one."""

from collections.abc import Sequence

from sltt.commands import yamltext
from sltt.commands.parsing import CommandOptions, find_recipe, shipped_recipes
from sltt.training.console import Console


def options() -> CommandOptions:
    """Return the options of `sltt recipes`."""
    parser = CommandOptions("sltt recipes", "List the recipes, or print one.")
    parser.add_argument("name", nargs="?", help="recipe to print")
    return parser


def run(words: Sequence[str]) -> None:
    """`sltt recipes [NAME]`."""
    if name := options().parse_args(words).name:
        print(yamltext.read(find_recipe(name)), end="")
        return
    report = Console()
    for name, path in shipped_recipes().items():
        report.line(f"{name:15} {path.read_text(encoding='utf-8').splitlines()[0].removeprefix('# ')}")
