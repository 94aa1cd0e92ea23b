"""The error of a file that cannot be used, and how what a file says is shown in it."""

from __future__ import annotations

import reprlib

_LONGEST_TEXT = 80


class CheckpointError(ValueError):
    """A checkpoint cannot be used; the message names the file or key and says what to do."""

    # Programs that show errors to users put the module before the name, unless it is this one.
    __module__ = "builtins"


def shown(value: object) -> str:
    """`value`, which a file holds, as a message shows it: printable, and short whatever it is."""
    brief = reprlib.Repr()
    brief.maxstring = brief.maxother = brief.maxlong = _LONGEST_TEXT
    try:
        text = brief.repr(value)
    except (ValueError, RecursionError):
        # Python writes no integer of thousands of digits.
        return f"a {type(value).__name__}"
    return text if len(text) <= _LONGEST_TEXT else f"{text[:_LONGEST_TEXT]}..."


def shown_word(value: object) -> str:
    """The same, without quotation marks around what can do without, such as the name of a class."""
    plain = isinstance(value, str) and value.isprintable() and 0 < len(value) <= _LONGEST_TEXT
    return str(value) if plain or value is None else shown(value)


def first_line(error: BaseException) -> str:
    """What a library's error says, in one short line."""
    line = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    line = "".join(letter if letter.isprintable() else " " for letter in line[: 3 * _LONGEST_TEXT])
    return f"{type(error).__name__}: {line}" if line else type(error).__name__
