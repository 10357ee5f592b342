"""Write what each name of docs/api.md is, the first line of its docstring: `python docs/write_api.py`."""

import inspect
import pkgutil
import re
from pathlib import Path

PAGE = Path(__file__).with_name("api.md")
NAME = re.compile(r"^\* `(sltt[\w.]*)`.*$", re.MULTILINE)


def line(found: re.Match[str]) -> str:
    """Return a name with the first line of its docstring."""
    first = (inspect.getdoc(pkgutil.resolve_name(found[1])) or "").partition("\n\n")[0]
    return f"* `{found[1]}`: {' '.join(first.split())}"


if __name__ == "__main__":
    PAGE.write_text(NAME.sub(line, PAGE.read_text()))
