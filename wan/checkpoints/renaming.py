"""diffusers' own renaming of single files, on names alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from ...checkpoints.checkpoint_error import CheckpointError, first_line


def renamed_by(convert: Callable[[dict[str, Any]], Any], path: Path, names: Iterable[str]) -> dict[str, str]:
    """The names of the file `path` by diffusers' names for them.

    Args:
        convert: takes a state dict and gives one under other names. It only moves values between names, so the names
            themselves can serve as values.
        path: for messages.
        names: in the file.

    Raises:
        CheckpointError: two names become one, or `convert` fails on a name.
    """
    given = list(names)
    try:
        renamed: dict[str, str] = convert({name: name for name in given})
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{path} has names that no checkpoint of Wan has ({first_line(error)}): give another file."
        ) from error
    kept = set(renamed.values())
    lost = next((name for name in given if name not in kept), None)
    if lost is not None:
        raise CheckpointError(f"{path} has {lost} under another name too: give a file with one model.")
    return renamed
