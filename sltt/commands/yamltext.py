"""YAML of recipes and options, refused where it would be read as something else than it says."""

from pathlib import Path
from typing import Any

import yaml
from jsonargparse import get_loader

from sltt.commands.failures import UsageError

MOST_NODES = 10_000  # a recipe has about a hundred


def read(path: Path) -> str:
    """Read the text of a file; raises UsageError, which names it, for one that is no UTF-8."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is no YAML that can be read: {error}; save it as UTF-8") from None


def load(text: str) -> Any:
    """Read YAML text as jsonargparse reads it.

    Raises yaml.YAMLError for a key that stands twice, an alias within itself, aliases or levels without end.
    """
    check(text)
    value = get_loader("yaml")(text)
    return None if value == "None" else value  # as jsonargparse hands on the null of an option of a nested class


def check(text: str) -> None:
    """Raise yaml.YAMLError, as `load` does, without making any object."""
    try:
        root = yaml.compose(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
        if root is not None and _size(root, {}) > MOST_NODES:
            raise yaml.YAMLError(f"the aliases stand for more than {MOST_NODES:,} values")
    except RecursionError:
        raise yaml.YAMLError("the values are nested too deeply") from None


def _size(node: yaml.Node, known: dict[yaml.Node, int | None]) -> int:
    """The values that a node stands for, aliases written out; `known` has those of other nodes, None for open ones."""
    if node in known:
        size = known[node]
        if size is None:
            raise yaml.YAMLError(f"a value contains itself, by an alias (line {node.start_mark.line + 1})")
        return size
    known[node] = None
    children: list[yaml.Node] = []
    if isinstance(node, yaml.MappingNode):
        _refuse_twice(node)
        children = [part for pair in node.value for part in pair]
    elif isinstance(node, yaml.SequenceNode):
        children = node.value
    known[node] = size = 1 + sum(_size(child, known) for child in children)
    return size


def _refuse_twice(node: yaml.MappingNode) -> None:
    lines: dict[str, int] = {}
    for key, _ in node.value:
        if isinstance(key, yaml.ScalarNode):
            line = key.start_mark.line + 1
            if key.value in lines:
                raise yaml.YAMLError(f"the key {key.value!r} stands twice, in lines {lines[key.value]} and {line}")
            lines[key.value] = line
