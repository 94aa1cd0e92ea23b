"""Which process runs the stream of a saved folder: the one that has the folder's lock file locked.

The lock is the operating system's, so it goes with the process, however that ends. Light: nodes list streams by it when
ComfyUI starts.
"""

from __future__ import annotations

import errno
import logging
import sys
import time
from pathlib import Path
from typing import BinaryIO

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

logger = logging.getLogger(__name__)

LOCK_NAME = "running.lock"
# Who looks whether a stream runs has it locked for a moment.
_TRIES, _PAUSE = 10, 0.02
_TAKEN = frozenset({errno.EACCES, errno.EAGAIN, errno.EDEADLK})


class RunningLock:
    """The lock of one folder, not yet taken.

    Args:
        folder: with a saved stream.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / LOCK_NAME
        self._file: BinaryIO | None = None

    def take(self) -> bool:
        """Take it, unless this has it; False where another stream has it, of this process or another.

        Where the disk knows no locks, such as some network folders, it counts as taken by this one.
        """
        if self._file is not None:
            return True
        for _ in range(_TRIES):
            try:
                # Appending makes it where it is not, and changes nothing.
                self._file = _locked(self._path)
            except OSError as error:
                if error.errno in _TAKEN:
                    time.sleep(_PAUSE)
                    continue
                logger.warning("%s cannot be locked: %s", self._path, error)
            return True
        return False

    def release(self) -> None:
        """Give it back; nothing where it was not taken."""
        if self._file is not None:
            self._file.close()
            self._file = None


def is_running(folder: Path) -> bool:
    """Whether some process runs the stream of `folder` now."""
    path = folder / LOCK_NAME
    try:
        if path.is_file():
            _locked(path).close()
    except OSError as error:
        return error.errno in _TAKEN
    return False


def _locked(path: Path) -> BinaryIO:
    """The file, open and locked; raises OSError with an errno of `_TAKEN` where it is locked already."""
    file = path.open("ab")
    try:
        if sys.platform == "win32":
            file.seek(0)
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BaseException:
        file.close()
        raise
    return file
