"""Show `sltt.fit` and `sltt.evaluate` with the arguments that `sltt.training.settings.takes` gives them."""

# pyright: reportMissingImports=false
import griffe

SETTINGS = {  # of a function: what its arguments are the fields of, in the order of its signature
    "training.fit.fit": "training.settings.Settings",
    "training.evaluation.evaluate": "training.evaluation.Evaluation",
}
SHARED = "training.settings.Execution"


class Arguments(griffe.Extension):
    """Reads signature and docstring from the fields of the settings."""

    def on_package(self, *, pkg, **kwargs):
        """Give the functions their arguments, once the package is read."""
        for path, kind in SETTINGS.items():
            function, shared, own = pkg[path], _fields(pkg[SHARED]), _fields(pkg[kind])
            later = {name: one for name, one in shared.items() if _option(one, "kw_only") != "False"}
            fields = [one for name, one in shared.items() if name not in later] + [*own.values(), *later.values()]
            function.parameters = griffe.Parameters(*map(_parameter, fields))
            lines = [f"    {one.name}: {' '.join(one.docstring.value.split())}" for one in fields]
            text = function.docstring.value.replace("Returns:", "\n".join(["Args:", *lines, "", "Returns:"]))
            function.docstring = griffe.Docstring(text, parent=function, parser="google")


def _fields(kind):
    found = ((name, one) for name, one in kind.members.items() if one.is_attribute and "property" not in one.labels)
    return {name: one for name, one in found if one.docstring}


def _option(field, name):
    """Return an argument of the call of `setting` that makes a field, as text; None where it is not there."""
    found = (one for one in getattr(field.value, "arguments", ()) if getattr(one, "name", None) == name)
    return next((str(one.value) for one in found), None)


def _parameter(field):
    makes = str(getattr(field.value, "function", "")) == "setting"
    default = _option(field, "default") if makes else field.value
    named = not makes or _option(field, "kw_only") != "False"
    kind = griffe.ParameterKind.keyword_only if named else griffe.ParameterKind.positional_or_keyword
    return griffe.Parameter(field.name, annotation=field.annotation, kind=kind, default=default)
