"""Write one HTML page with the tables and figures of what the commands measured, and of runs.

It opens offline. The figures lie beside it as PNG and SVG, the tables as CSV.
"""

from collections.abc import Sequence
from pathlib import Path

from sltt.commands.parsing import CommandOptions
from sltt.commands.results import gather
from sltt.training.console import Console


def options() -> CommandOptions:
    parser = CommandOptions("sltt report", __doc__)
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER", help="of a run, or one given to --save")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="default: report in the first folder")
    return parser


def run(words: Sequence[str]) -> None:
    args = options().parse_args(words)
    results = gather(args.folders)
    try:
        from sltt.commands.page import write
        from sltt.commands.sections import sections

        page = write(sections(results), results, args.out or args.folders[0] / "report")
    except ModuleNotFoundError as error:
        raise RuntimeError(f"the report needs {error.name}: pip install 'sltt[report]'") from error
    console = Console()
    for note in results.notes:
        console.warn(note)
    console.line(f"report: {page}")
