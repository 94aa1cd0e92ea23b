"""The error message for a full disk."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

# A full disk, or an exhausted user quota; Windows has no quota error.
_FULL = frozenset({errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)})


@contextmanager
def explaining_full_disk(folder: Path, what_is_left: Callable[[], str]) -> Iterator[None]:
    """Turn an error of a full disk into one that names the disk; other errors pass through unchanged.

    Args:
        folder: that is written to.
        what_is_left: called when the disk is full; returns a clause on what was written and what is lost.

    Raises:
        OSError: with the original errno, in one sentence.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in _FULL:
            raise
        message = f"the disk of {folder} is full: {what_is_left()}; free some space and run again"
        raise OSError(error.errno, message) from error
