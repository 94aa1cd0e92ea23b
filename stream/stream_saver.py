"""Saves a running stream to its folder, every few blocks and where it ends early.

Its pictures are on the disk before a snapshot is begun, which says how many they were: a large one is written while the
stream goes on, and the video with it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from .direction import Direction
from .given_pictures import GivenPictures
from .run_point import RunPoint
from .saved_folder import SavedFolder
from .saved_stream import SavedStream
from .session import Session
from .sinks import Mp4Sink
from .snapshot import InputVideo, StreamSnapshot
from .snapshot_writing import AbandonedError, SnapshotWriting

# Saves that take longer than this, in seconds, may take a twentieth of the time.
_SLOW, _WAIT = 0.5, 20

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Noted:
    """Where a run stood behind its last block: what a snapshot of it says beside the state."""

    point: RunPoint
    input_video: InputVideo | None
    attention_bias: float


class StreamSaver:
    """Saves one run.

    Args:
        folder: of the run.
        every: blocks between two saves; 1 or more.
        video: the sink whose file grows in the folder.
        node: see `RunPoint`.
        workflow: see `RunPoint`.
        asked: see `RunPoint`.

    Attributes:
        notices: sentences on what could not be saved, each said once.
        saved_blocks: of the run, at the newest snapshot; 0 where there is none of this process.
    """

    def __init__(
        self, folder: SavedFolder, every: int, video: Mp4Sink, *, node: str = "", workflow: str = "", asked: str = ""
    ) -> None:
        self.notices: list[str] = []
        self._folder = folder
        self._every = every
        self._video = video
        self._node, self._workflow, self._asked = node, workflow, asked
        self._noted: _Noted | None = None
        self.saved_blocks = 0
        self._not_before = 0.0
        self._writing = SnapshotWriting()

    def block_made(
        self, session: Session, given: GivenPictures, direction: Direction, *, blocks: int, pictures: int, edited: bool
    ) -> None:
        """A block is in the sinks: note where the stream is, and save it if that is due. Raises nothing of its own.

        Args:
            session: of the stream, between two blocks.
            given: pictures of the stream.
            direction: what it followed.
            blocks: of the run that are made.
            pictures: of these.
            edited: whether somebody has changed the direction.
        """
        bias = direction.bias_of(blocks - 1, session.settings.attention_bias)
        self._noted = _Noted(self._point(session, given, direction, blocks, pictures, edited), given.taken(), bias)
        session.note_block()
        # The first one at once: what cannot be saved is said early.
        if blocks % self._every == 0 or self.saved_blocks == 0:
            self._save_unless_slow(lambda: session.snapshot(lean=True), self._noted)

    def stream_failed(self, session: Session, direction: Direction, *, edited: bool) -> None:
        """The stream ends early: save what its last block left. Raises nothing of its own.

        Args:
            session: of the stream, perhaps in the midst of a block.
            direction: what the block that failed would have followed.
            edited: whether somebody has changed it.
        """
        self._writing.wait()
        noted = self._noted
        if noted is None or noted.point.blocks == self.saved_blocks:
            return
        track = direction.as_track()
        point = replace(noted.point, track=track.written(), interpolation=track.interpolation, edited=edited)
        self._save(session.snapshot_of_noted, replace(noted, point=point), quietly=True)
        self._writing.wait()

    def stream_finished(self) -> None:
        """The stream has all of its blocks: what is still being written is not needed."""
        self._writing.abandon()

    def _save_unless_slow(self, take: Callable[[], StreamSnapshot], noted: _Noted) -> None:
        if not self._writing.is_busy and time.monotonic() >= self._not_before:
            self._save(take, noted)

    def _save(self, take: Callable[[], StreamSnapshot], noted: _Noted, *, quietly: bool = False) -> None:
        """Take a snapshot, and begin to write it."""
        began = time.monotonic()
        try:
            snapshot = take()
            mark = noted.point.video
            # Behind it on the disk: a snapshot that is there means that its pictures are.
            self._video.sync()
            snapshot = replace(
                snapshot.with_video(self._video.path, self._video.fps, mark.pictures).with_input(noted.input_video),
                settings=replace(snapshot.settings, attention_bias=noted.attention_bias),
            )
            # Before there is anything that somebody else could go on from.
            self._folder.claim()
            saved = SavedStream(snapshot, replace(noted.point, saved=time.time()))
        except Exception as error:
            self._say_failed(noted, error, quietly)
            self._rest_after(began)
            return
        self._writing.begin(lambda: self._write(saved, noted, began, quietly), snapshot.bytes)

    def _write(self, saved: SavedStream, noted: _Noted, began: float, quietly: bool) -> None:
        try:
            self._folder.save(saved, self._writing.check)
            self.saved_blocks = noted.point.blocks
        except AbandonedError:
            return
        except Exception as error:
            self._say_failed(noted, error, quietly)
        self._rest_after(began)

    def _rest_after(self, began: float) -> None:
        took = time.monotonic() - began
        self._not_before = began + took * _WAIT if took > _SLOW else 0.0

    def _say_failed(self, noted: _Noted, error: Exception, quietly: bool) -> None:
        # Of any kind: a stream is not lost for want of a snapshot, and a second failure hides no first.
        logger.warning("the stream was not saved behind block %d: %s", noted.point.blocks, error)
        said = f"The stream could not be saved, first behind block {noted.point.blocks} ({error}); it went on."
        if not quietly and not self.notices:
            self.notices.append(said)

    def _point(
        self,
        session: Session,
        given: GivenPictures,
        direction: Direction,
        blocks: int,
        pictures: int,
        edited: bool,
    ) -> RunPoint:
        track: Any = direction.as_track()
        return RunPoint(
            blocks=blocks,
            planned=session.settings.planned_blocks,
            pictures=pictures,
            block_pictures=given.made,
            track=track.written(),
            interpolation=track.interpolation,
            edited=edited,
            video=self._video.mark(),
            recipe=repr(session.pipeline.recipe),
            node=self._node,
            workflow=self._workflow,
            saved=0.0,
            asked=self._asked,
        )
