"""Names of files as a terminal shows them."""


def escape(text: str) -> str:
    """Escape what a terminal would obey, or could not show, such as colours in the name of a folder."""
    return "".join(char if char.isprintable() or char == "\n" else repr(char)[1:-1] for char in text)
