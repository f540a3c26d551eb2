"""One line of an error, for a warning, a refusal or a note."""

from __future__ import annotations


def first_line(error: BaseException) -> str:
    """The first line of its message that says something, else its type."""
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)


def named_line(error: BaseException) -> str:
    """The same behind its type, where the message alone would not say what kind of failure it is."""
    name, line = type(error).__name__, first_line(error)
    return name if line == name else f"{name}: {line}"
