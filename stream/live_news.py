"""What pages are told about a running stream. Written by the stream's thread, read by a server's."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from math import inf, isfinite
from threading import Lock
from typing import Any

import torch

from .live_control import LiveControl
from .memory_points import MemoryPoints
from .picture_encoding import BlockPictures
from .shown_pictures import ShownPictures

# A page asks again within 20 seconds, whatever happens.
_SECONDS_WATCHED = 60.0
ENDED = ("finished", "stopped", "cancelled", "failed")


@dataclass(frozen=True)
class NewsFields:
    """What is told; JSON values that nobody changes afterwards.

    Attributes:
        state: loading, running, pausing, paused, stopping, finished, stopped, cancelled or failed.
        says: the line on the node, {"id", "values"}.
        blocks_made: blocks that are done.
        blocks: of the whole stream; None where it is endless.
        pictures_made: pictures that are done.
        seconds: of video that are done.
        fps: pictures a second of the video.
        rate: pictures made a second, of the newest block.
        prompt: of the block being made; None where a conditioning stands for it.
        strength: of the block being made; None without a video.
        attention_bias: of the block being made.
        next: the next planned prompt, {"block", "prompt"}; the block is counted from 0.
        allowed: as `Allowed`; told by the control where one is followed.
        pending: the edits that wait; told by the control where one is followed.
        track: the applied track's text; it may be megabytes long, so a page that has it is told None.
        interpolation: of prompts, "linear" or "slerp".
        edited: whether the stream was steered.
        takes_frames: whether pages can give pictures.
    """

    state: str = "loading"
    says: Mapping[str, Any] | None = None
    blocks_made: int = 0
    blocks: int | None = None
    pictures_made: int = 0
    seconds: float = 0.0
    fps: float = 0.0
    rate: float | None = None
    prompt: str | None = None
    strength: float | None = None
    attention_bias: float | None = None
    next: Mapping[str, Any] | None = None
    allowed: Mapping[str, str] = field(default_factory=lambda: {"prompt": "", "strength": "", "attention_bias": ""})
    pending: Mapping[str, Any] | None = None
    track: str = ""
    interpolation: str = "linear"
    edited: bool = False
    takes_frames: bool = False


@dataclass(frozen=True)
class NewsPage:
    """What a page has not seen.

    Attributes:
        header: JSON values: `version`, all `NewsFields`, `memory`, `points_from`, `points`.
        pictures: of the newest block; None where the page has them, or there are none.
        more: the pictures behind those, where the block is shown in parts.
    """

    header: dict[str, Any]
    pictures: BlockPictures | None
    more: tuple[BlockPictures, ...] = ()


class LiveNews:
    """The newest state of a stream, with a version that grows by each change; of pictures, the newest block's only.

    All methods may be called from any thread, and none waits for a page.
    """

    def __init__(self) -> None:
        self._lock = Lock()
        self._version = self._track_since = 0
        self._fields = NewsFields()
        self._memory = MemoryPoints()
        self._pictures = ShownPictures()
        self._control: LiveControl | None = None
        self._listeners: tuple[Callable[[], None], ...] = ()
        self._asked_at = -inf

    @property
    def version(self) -> int:
        """Of what would be told now."""
        return self._version

    @property
    def is_watched(self) -> bool:
        """Whether a page has lately asked."""
        return time.monotonic() - self._asked_at < _SECONDS_WATCHED

    @property
    def state(self) -> str:
        """What the stream last said it does; see `NewsFields.state`."""
        return self._fields.state

    @property
    def has_ended(self) -> bool:
        """Whether nothing more will come."""
        return self._fields.state in ENDED

    @property
    def fps(self) -> float:
        """Pictures a second of the video; 0 before it is known."""
        return self._fields.fps

    def follow(self, control: LiveControl | None) -> None:
        """Tell what was asked of `control` as it is when a page is told: `pending`, `allowed`, and in `state`.

        So the stream says only what it does: loading, running, paused, and how it ended. Who changes a control calls
        `update()` behind it. None stops following, and what was told last stays.
        """

        def change() -> None:
            self._fields = self._told()
            self._control = control

        self._change(change)

    def update(self, **fields: Any) -> int:  # noqa: ANN401
        """Change some of `NewsFields`, none to tell of a changed control; returns the version.

        Raises:
            TypeError: a field that there is not.
        """

        return self._change(lambda: self._set(fields))

    def show_block(self, frames: torch.Tensor, *, block: int, **fields: Any) -> int:  # noqa: ANN401
        """As `update`, with a block's pictures, which take the place of those before.

        Args:
            frames: uint8 [F, height, width, 3] on the CPU; held by reference until a page asks or the next block.
            block: counted from 0.
            fields: some of `NewsFields`.
        """

        def change() -> None:
            self._set(fields)
            self._pictures.set_block(frames, block)

        return self._change(change)

    def show_part(self, frames: torch.Tensor, *, block: int, first: int, of: int) -> int:
        """Show pictures of a block that is being decoded; `show_block` follows. See `ShownPictures.add_part`."""
        return self._change(lambda: self._pictures.add_part(frames, block=block, first=first, of=of))

    def add_memory(self, point: Mapping[str, Any]) -> int:
        """Tell a point of the memory chart, as `MemoryChart` makes it."""
        return self._change(lambda: self._memory.add(point))

    def end(self, state: str) -> None:
        """Say how the stream ended, unless that was said, and that nothing can be asked of it any more."""
        self.follow(None)
        self.update(state=self._fields.state if self.has_ended else state, pending=None)

    def drop_pictures(self) -> None:
        """Hold no pictures any more."""
        with self._lock:
            self._pictures.drop()

    def since(self, block: int = -1, points: int = 0, version: int = -1, pictures: int | None = None) -> NewsPage:
        """All there is, less what a page has.

        Args:
            version: of what it was told last, -1 for nothing: it has the track since then.
            block: whose pictures it has, -1 for none.
            points: its cursor into the memory chart, 0 for none; see `PointsSince`.
            pictures: how many of that block's pictures it has; None shows it whole blocks only.
        """
        self._asked_at = time.monotonic()
        with self._lock:
            told, memory = self._told(), self._memory.since(points)
            unseen = self._pictures.since(block, pictures)
            header = {
                "version": self._version,
                **told.__dict__,
                "track": None if self._track_since <= version <= self._version else told.track,
                "memory": memory.points,
                "points_from": memory.begin,
                "points": memory.cursor,
            }
        return NewsPage(header, unseen[0] if unseen else None, unseen[1:])

    def add_listener(self, listener: Callable[[], None]) -> None:
        """Call `listener` behind each change, in the thread that made it."""
        with self._lock:
            self._listeners = (*self._listeners, listener)

    def remove_listener(self, listener: Callable[[], None]) -> None:
        """Call it no more; nothing happens if it is not called."""
        with self._lock:
            self._listeners = tuple(one for one in self._listeners if one is not listener)

    def _set(self, fields: Mapping[str, Any]) -> None:
        before = self._fields.track
        self._fields = replace(self._fields, **{name: _finite(value) for name, value in fields.items()})
        if self._fields.track != before:
            # The version that this change makes.
            self._track_since = self._version + 1

    def _change(self, change: Callable[[], None]) -> int:
        with self._lock:
            change()
            self._version += 1
            version, listeners = self._version, self._listeners
        for listener in listeners:
            listener()
        return version

    def _told(self) -> NewsFields:
        """The fields with what was asked of the control."""
        fields, control = self._fields, self._control
        if control is None:
            return fields
        return replace(
            fields,
            state=_asked(fields.state, control),
            pending=control.pending.values() or None,
            allowed=asdict(control.allowed),
        )


def _asked(state: str, control: LiveControl) -> str:
    """What a stream in `state` is about to do."""
    if state in ENDED:
        return state
    if control.is_stopped:
        return "stopping"
    if control.is_paused:
        return "paused" if state == "paused" else "pausing"
    return "running" if state in ("pausing", "paused") else state


def _finite(value: Any) -> Any:  # noqa: ANN401
    """None for a number that JSON has no word for."""
    return None if isinstance(value, float) and not isfinite(value) else value
