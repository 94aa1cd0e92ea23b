"""Names of files that a workflow gives: text that no other program would take for another name."""

from __future__ import annotations

import re

# C0 and C1 with DEL (NUL ends a name in C, so it would be that of another file), the separators of lines and
# paragraphs, marks that turn the direction of writing, which disguise an ending, and halves of characters.
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def check_name(what: str, name: str) -> None:
    """Raise ValueError, one sentence, for a name with control characters or `..`.

    Args:
        what: the input that it is of.
        name: may hold sub-folders, with separators of any system.
    """
    if _CONTROL.search(name) or ".." in re.split(r"[/\\]", name):
        raise ValueError(
            f"{what} is {name!r}: give a name, with sub-folders if you like, without '..' and without control "
            "characters such as line breaks."
        )
