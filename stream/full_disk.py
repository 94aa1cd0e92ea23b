"""What a user reads when a disk is full."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

# A full disk, and a user's quota of it used up; Windows has no quota error.
_FULL = frozenset({errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)})


@contextmanager
def explaining_full_disk(folder: Path, what_is_left: Callable[[], str]) -> Iterator[None]:
    """Say which disk is full when one is, and pass every other error on as it is.

    Args:
        folder: that is written to.
        what_is_left: gives, when the disk is full, half a sentence on what was written and what is lost.

    Raises:
        OSError: with the error's own number, in one sentence.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in _FULL:
            raise
        message = f"the disk of {folder} is full: {what_is_left()}; free some space and run again"
        raise OSError(error.errno, message) from error
