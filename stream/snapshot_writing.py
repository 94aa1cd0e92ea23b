"""Writes a stream's snapshots, large ones while the stream goes on."""

from __future__ import annotations

import threading
from collections.abc import Callable

# Smaller ones take less time than a block. Keys of a window are gigabytes, which take a disk many seconds.
LARGE_BYTES = 1 << 28


class AbandonedError(RuntimeError):
    """Nobody wants the file any more that is being written."""

    # See CheckpointError.
    __module__ = "builtins"


class SnapshotWriting:
    """One file at a time, so that no more than one snapshot is held in memory for it."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._abandoned = threading.Event()

    @property
    def is_busy(self) -> bool:
        """Whether a file is being written."""
        return self._thread is not None and self._thread.is_alive()

    def begin(self, write: Callable[[], None], size: int) -> None:
        """Have `write` write so many bytes: on return if they are few, and beside the caller if they are many.

        It raises nothing, and asks `check` now and then.
        """
        self.wait()
        if size < LARGE_BYTES:
            write()
            return
        self._thread = threading.Thread(target=write, name="streamblocks save", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raise AbandonedError where the file is not wanted any more."""
        if self._abandoned.is_set():
            raise AbandonedError

    def wait(self) -> None:
        """Return once nothing is being written."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def abandon(self) -> None:
        """End what is being written; nothing more will be."""
        self._abandoned.set()
        self.wait()
