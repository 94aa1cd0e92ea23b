"""The folder of one saved stream: its two newest snapshots, and the video that grows beside them."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ..memory.json_text import json_text
from .file_removal import remove_file
from .run_point import RunPoint, SnapshotFileError, read_point
from .running_lock import RunningLock
from .saved_names import NAME, names_of_saved
from .saved_stream import VIDEO, SavedStream, describe_saved, read_saved
from .snapshot_file import PARTS, read_snapshot_file, read_text, write_snapshot_file

logger = logging.getLogger(__name__)

# The newest may be damaged: by a disk that lied, or by hand.
KEPT = 2
_WORKFLOW = "workflow.json"


class SavedFolder:
    """The folder of one saved stream.

    Args:
        path: of the folder; made by the first save.
        workflow: ComfyUI's workflow that makes the stream, put beside its first snapshot; None for none.
    """

    def __init__(self, path: Path, workflow: Any = None) -> None:  # noqa: ANN401
        self.path = path
        self._workflow = workflow
        self._lock = RunningLock(path)

    @property
    def video(self) -> Path:
        """Where the video grows."""
        return self.path / VIDEO

    def claim(self) -> bool:
        """Have no other run go on with the stream until `release`; False where one does, of this process or another."""
        return self._lock.take()

    def release(self) -> None:
        """Let others go on with the stream."""
        self._lock.release()

    def snapshots(self) -> list[Path]:
        """The files, newest first; raises OSError where the folder cannot be read."""
        found = [(int(match[1]), path) for path in self.path.iterdir() if (match := NAME.fullmatch(path.name))]
        return [path for _, path in sorted(found, reverse=True)]

    def save(self, saved: SavedStream, check: Callable[[], None] = lambda: None) -> Path:
        """Write a snapshot; on return it is on the disk, and only the one before is kept.

        Args:
            saved: the snapshot.
            check: called at each piece that is written; what it raises ends the writing.

        Raises:
            ValueError: it holds what a file cannot.
            OSError: it cannot be written; those before are untouched.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        blocks = saved.snapshot.blocks_made if saved.point is None else saved.point.blocks
        for part in self.path.glob(PARTS):
            # Of a process that was killed.
            remove_file(part)
        path = self.path / f"block_{blocks:07}.safetensors"
        write_snapshot_file(path, saved.snapshot.tensors, describe_saved(saved), check)
        if self._workflow is not None:
            # As the page saves it: dropped there, it opens.
            (self.path / _WORKFLOW).write_text(json_text(self._workflow), encoding="utf-8")
            self._workflow = None
        for old in self.snapshots()[KEPT:]:
            remove_file(old)
        return path

    def load(self) -> tuple[SavedStream, list[str]]:
        """The newest snapshot that is whole, and sentences on newer ones that are not.

        Raises:
            SnapshotFileError: there is none.
            MemoryError: there is too little RAM for it.
        """
        said: list[str] = []
        for path in self._listed():
            try:
                tensors, text = read_snapshot_file(path)
                return read_saved(path, text, tensors), said
            except SnapshotFileError as error:
                logger.warning("%s", error)
                said.append(f"{error} The one before was taken.")
        why = said[-1].removesuffix(" The one before was taken.") if said else "it holds none."
        raise SnapshotFileError(f"{self.path} has no snapshot to go on from: {why}")

    def point(self) -> RunPoint | None:
        """Where the run stood at its newest snapshot, by headers alone; None where there is nothing to resume."""
        for path in self._listed():
            try:
                return read_point(path, read_text(path))
            except SnapshotFileError as error:
                logger.info("%s", error)
        return None

    def discard(self) -> None:
        """Remove all that was made here, and the folder; what cannot be removed stays, and the log says why."""
        # Snapshots first: what is left of a removal that ends in between is no stream to resume.
        self.discard_snapshots()
        # An open file may not be removed everywhere.
        self.release()
        try:
            shutil.rmtree(self.path)
        except FileNotFoundError:
            return
        except OSError as error:
            logger.warning("%s was not removed: %s", self.path, error)

    def discard_snapshots(self) -> None:
        """Remove the snapshots; the video stays."""
        for path in self._listed():
            remove_file(path)

    def _listed(self) -> list[Path]:
        try:
            return self.snapshots()
        except OSError as error:
            logger.info("%s cannot be read: %s", self.path, error)
            return []


def saved_folders(root: Path) -> Iterator[SavedFolder]:
    """The folders in `root` that hold a snapshot, the one that was written last first."""
    yield from (SavedFolder(root / name) for name in names_of_saved(root))
