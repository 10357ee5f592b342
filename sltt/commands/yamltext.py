"""YAML of recipes and options, refused where it would be read as something else than it says."""

from pathlib import Path
from typing import Any

import yaml
from jsonargparse import get_loader

from sltt.commands.failures import UsageError

MOST_NODES = 10_000  # a recipe has about a hundred


def read_text(path: Path) -> str:
    """Read the text of a file; raises UsageError, which names it, for one that is no UTF-8."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is no YAML that can be read: {error}; save it as UTF-8") from None


def load_yaml(text: str) -> Any:
    """Read YAML text as jsonargparse reads it.

    Raises yaml.YAMLError for a key that stands twice or is none of a class, and for aliases without end.
    """
    nodes: list[Any] = [yaml.compose(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))]
    for count, node in enumerate(nodes):  # which grows by the values within each
        if count > MOST_NODES:
            raise yaml.YAMLError(f"the aliases stand for more than {MOST_NODES:,} values")
        if isinstance(node, yaml.MappingNode):
            _check_keys(node)
            nodes += [part for pair in node.value for part in pair]
        elif isinstance(node, yaml.SequenceNode):
            nodes += node.value
    value = get_loader("yaml")(text)
    return None if value == "None" else value  # as jsonargparse hands on the null of an option of a nested class


def _check_keys(node: yaml.MappingNode) -> None:
    lines: dict[str, int] = {}
    for key, _ in node.value:
        if isinstance(key, yaml.ScalarNode):
            line = key.start_mark.line + 1
            if key.value in lines:
                raise yaml.YAMLError(f"the key {key.value!r} stands twice, in lines {lines[key.value]} and {line}")
            lines[key.value] = line
    if "class_path" in lines and (other := lines.keys() - {"class_path", "init_args", "dict_kwargs"}):
        raise yaml.YAMLError(f"a class has the keys class_path and init_args, got {min(other)!r}")
