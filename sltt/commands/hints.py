"""Rewrite messages of the option parser in one line, with the word that was meant."""

import difflib
import inspect
import pydoc
import re
import sys
from collections.abc import Iterable, Mapping
from typing import Any, get_args

import sltt

# what the parser says around a reason
AROUND = re.compile(
    r'Parser key "[^"]+":|Problem with given class_path \'[\w.]+\':|Does not validate.*|Subtypes:.*|Errors:|'
    r"Given value.*|Type \S.* callable class:"
)
EXPECTED = re.compile(r"Expected an? (?:<class '|typing\.Literal)?(.+?)(?:'>)?(?:\. Got value.*)?$")
UNKNOWN = re.compile(
    r"dot import path string: (.*?)(?:\. Got value.*)?$|class_path '([\w.]+)':\s+module '.*' has no attribute",
    re.MULTILINE,
)


def explain(message: str, values: Mapping[str, Any]) -> str:
    """Return an error of the parser in a line, with the nearest valid name where one is not known."""
    if option := re.search(r"unrecognized arguments: --([^\s=]+)", message):
        return f"unknown option --{option[1]}{_nearest_option(option[1], values)}"
    if word := re.search(r"unrecognized arguments: (\S+)", message):
        return f"unexpected word {word[1]!r}: expected one recipe or run, then options such as --epochs 3"
    if key := re.search(r"Option '([^']+)' is not accepted", message):
        owners = re.findall(r"class_path[ =]'([\w.]+)'", message)
        owner = locate(owners[-1]) if owners else None
        names = list(inspect.signature(owner).parameters) if owner else fit_arguments()
        return f"unknown key {key[1]!r}{f' of {owners[-1]}' if owners else ''}{suggest(key[1], names)}"
    key = ".".join(re.findall(r'Parser key "([^"]+)"', message))
    lines = [rest for line in message.splitlines() if (rest := AROUND.sub("", line).strip(" -"))]
    kinds = [kind[1] for line in lines if (kind := EXPECTED.match(line))]
    kinds = [kind for kind in dict.fromkeys(kinds) if not kind.startswith("dot import path")]
    if (name := UNKNOWN.search(message)) and set(kinds) <= {"NoneType"}:
        return _unknown_class(name[1] or name[2])
    if reasons := [line for line in lines if not EXPECTED.match(line)]:
        return f"{key}: {reasons[0]}" if key else " ".join(reasons)
    if key == "precision":  # the parser names the type of the first choice only
        kinds = [str(list(get_args(inspect.signature(sltt.fit).parameters[key].annotation)))]
    value = re.findall(r"(?:Given|Got) value: (.*?)(?:\. Got value: .*)?$", message, re.MULTILINE)
    return f"{key}: expected {' or '.join(kinds)}, got {value[0]}"


def _nearest_option(option: str, values: Mapping[str, Any]) -> str:
    """Return the option of that name of one of the recipe's classes, or else the one that is spelt alike."""
    owned = [
        f"; did you mean --{key}.{option}?"
        for key, value in values.items()
        if isinstance(value, dict)
        and "class_path" in value
        and option in inspect.signature(locate(value["class_path"])).parameters
    ]
    return owned[0] if owned else suggest(option.split(".")[0], fit_arguments(), "--")


def _unknown_class(name: str) -> str:
    module, _, last = name.rpartition(".")
    own = dir(sys.modules.get(module))  # of the user's file, say
    known = _class_paths() | {one: f"{module}.{one}" for one in own if one[0] != "_"}
    paths = {one.lower(): path for one, path in known.items()}
    near = difflib.get_close_matches(last.lower(), paths, 1)
    hint = f"did you mean {paths[near[0]]}?" if near else "expected a path to import such as sltt.SLTT"
    return f"unknown class {name!r}; {hint}"


def fit_arguments() -> list[str]:
    """Return the options of a training: the arguments of `sltt.fit` that a recipe has."""
    return [name for name in inspect.signature(sltt.fit).parameters if name != "report"]


def _class_paths() -> dict[str, str]:
    """Return the import paths of what recipes name, by the names alone."""
    from torch import optim  # here, since `sltt trian` asks for `suggest` alone

    families = (sltt.models, sltt.data, sltt.losses, sltt.metrics, sltt.schedules, sltt.callbacks, sltt.surrogates)
    modules = (optim, *families, sltt)
    members = ((name, m) for m in modules for name in dir(m) if name[0] != "_" and callable(getattr(m, name)))
    return {name: f"{m.__name__}.{name}" for name, m in members}


def locate(path: str) -> Any:
    """Import what a path names, or the name alone of a class that recipes know."""
    return pydoc.locate(path if "." in path else _class_paths().get(path, path))


def suggest(name: str, names: Iterable[str], prefix: str = "") -> str:
    """Return a question for the known name that is spelt like this one; empty where none is."""
    near = difflib.get_close_matches(name, list(names), 1)
    return f"; did you mean {prefix}{near[0]}?" if near else ""
