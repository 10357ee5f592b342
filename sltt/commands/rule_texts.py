"""Rules as options of the commands: SLTT:k=1,TBPTT:window=4."""

import re


def rules(text: str) -> list[str]:
    """Split rules separated by commas, such as SLTT:k=1 or Mixed:windows={features.2: all, features.5: 4}."""
    texts = _split(text, ",")
    for rule in texts:
        rule_options(rule)
        if texts.count(rule) > 1:
            raise ValueError(f"expected each rule once, got {rule} {texts.count(rule)} times")
    return texts


def rule_options(text: str) -> list[str]:
    """Return the options of `sltt train` for one of `rules`; raise ValueError if it is not understood."""
    name, *settings = _split(text, ":")
    if not name or any("=" not in setting for setting in settings):
        raise ValueError(f"expected a rule such as BPTT, SLTT:k=1 or TBPTT:window=4, got {text!r}")
    pairs = (setting.split("=", 1) for setting in settings)
    return ["--rule", name, *(word for key, value in pairs for word in (f"--rule.{key}", value))]


def _split(text: str, separator: str) -> list[str]:
    """Split, but not within braces."""
    return re.split(rf"{separator}(?![^{{]*}})", text)
