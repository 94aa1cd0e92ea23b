"""JSON that somebody else wrote: read within bounds of size, nesting and memory, before anything believes it.

Python's own reader takes any nesting, a hundred bytes of memory for three of text, and the last of two equal names. So
the text is gone through once for its brackets, commas and strings, which is what values are made of.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .checkpoint_error import CheckpointError, shown
from .file_bytes import read_at_most

# A transformer of 40 layers has a header of 0.2 MB, and trainers' statistics beside it can take some megabytes.
LARGEST_TEXT = 10_000_000
# A letter outside of the first 65,536 makes a whole string take 4 bytes a letter, in the text and in the value.
_LARGEST_WIDE_TEXT = 4_000_000
_DEEPEST = 64
# Strings, brackets and commas. A tensor in a header has about 15, and takes about a kilobyte once it is read.
_MOST_MARKS = 600_000
_MARKS = re.compile(rb'"[^"]*"?|[\[{]|[\]}]|,')


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises CheckpointError when the file is absent, no regular file, too large, or what `parse_json` refuses.
    """
    return parse_json(read_at_most(path, LARGEST_TEXT), str(path))


def parse_json(text: bytes | str, place: str) -> dict[str, Any]:
    """The object that `text` holds, in UTF-8 where it is bytes.

    Args:
        text: what was read; a string where it was within other JSON.
        place: what holds it, for messages, such as a path.

    Raises:
        CheckpointError: it is no JSON object, is larger or nested deeper than such files are, or names something twice.
    """
    try:
        return load_object(text)
    except _NoObjectError as error:
        raise CheckpointError(f"{place} holds no JSON object: download it again.") from error
    except ValueError as error:
        raise CheckpointError(f"{place} cannot be read as JSON ({error}): download it again.") from error


def load_object(text: bytes | str) -> dict[str, Any]:
    """The same for what is no checkpoint; raises ValueError, a part of a sentence."""
    # A surrogate, which JSON can spell and UTF-8 cannot, is refused when the bytes are decoded.
    content = text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass")
    _check_bounds(content)
    try:
        found = json.loads(content.decode("utf-8-sig"), object_pairs_hook=_object)
    except RecursionError as error:
        raise ValueError(str(error)) from error
    if not isinstance(found, dict):
        raise _NoObjectError("it is no JSON object")
    return found


class _NoObjectError(ValueError):
    """JSON of another kind."""

    # See CheckpointError.
    __module__ = "builtins"


def _check_bounds(text: bytes) -> None:
    limit = LARGEST_TEXT if text.isascii() and rb"\u" not in text else _LARGEST_WIDE_TEXT
    if len(text) > limit:
        raise ValueError(f"it has {len(text)} bytes, and up to {limit} are read")
    depth = 0
    # Without escapes a string ends at the next quotation mark.
    plain = text.replace(rb"\\", b"").replace(rb"\"", b"")
    for count, mark in enumerate(_MARKS.finditer(plain)):
        first = mark[0][:1]
        if first in b"[{":
            depth += 1
            if depth > _DEEPEST:
                raise ValueError(f"it is nested more than {_DEEPEST} deep")
        elif first in b"]}":
            depth -= 1
        if count > _MOST_MARKS:
            raise ValueError("it has more values than any model's")


def _object(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    content: dict[str, Any] = {}
    for name, value in pairs:
        if name in content:
            raise ValueError(f"it has {shown(name)} twice")
        content[name] = value
    return content
