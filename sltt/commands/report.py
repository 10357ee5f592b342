"""`sltt report`: one page of what the commands measured and of runs."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sltt.commands.failures import cause
from sltt.commands.parsing import CommandOptions
from sltt.commands.results import Gathered, gather
from sltt.training.console import Console

if TYPE_CHECKING:
    from sltt.commands.page import Section

HELP = (
    "Write one HTML page with the tables and figures of runs, comparisons, few-shot classes, profiles, "
    "agreements and learning rates. It needs no network. The figures lie beside it as PNG and SVG, the tables as CSV."
)


def options() -> CommandOptions:
    """Return the options of `sltt report`."""
    parser = CommandOptions("sltt report", HELP)
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER", help="of a run, or one given to --save")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="default: report in the first folder")
    parser.add_argument("--json", action="store_true", help="print the path of the page and the notes as JSON")
    return parser


def run(words: Sequence[str]) -> None:
    """`sltt report FOLDER ...`: one page of what the commands measured and of runs."""
    known = options().parse_args(words)
    found = gather(known.folders)
    try:
        from sltt.commands.page import write

        page = write(_sections(found), found, known.out or known.folders[0] / "report")
    except ModuleNotFoundError as error:
        raise RuntimeError(f"the report needs {error.name}: pip install 'sltt[report]'") from error
    if known.json:
        print(json.dumps({"page": str(page), "notes": found.notes}))
        return
    shown = Console()
    for note in found.notes:
        shown.warn(note)
    shown.line(f"report: {page}")


def _sections(found: Gathered) -> "list[Section]":
    """Make the sections of what was found; what has other content than a command writes is left out, with a note."""
    from sltt.commands.sections import sections

    try:
        return sections(found)
    except ModuleNotFoundError:
        raise
    except Exception:  # of which file, each by itself shows
        whole = Gathered(notes=found.notes)
        parts = [(path, kind, [one]) for path, kind, one in found.files]
        for path, kind, part in [*parts, *((run, "runs", {run: one}) for run, one in found.runs.items())]:
            try:
                sections(Gathered(**{kind: part}))
            except Exception as error:
                found.notes.append(f"{path} is left out: {cause(error)}")
                continue
            more = getattr(whole, kind)
            more.update(part) if isinstance(part, dict) else more.extend(part)
        return sections(whole)
