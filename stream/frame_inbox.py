"""Pictures that pages push while a stream runs, the newest only: written by a server, read by the stream."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from threading import Condition

import torch

from .fit_pictures import PictureFit
from .jpeg_pictures import decode_jpeg

_SECONDS_BETWEEN_LOOKS = 0.2
# A block's pictures, before one was made: most models take as many.
_FIRST_ROOM = 12
# Before a stream says its size, pictures are as large as pages send them.
_MOST_BYTES = 64 * 2**20


@dataclass(frozen=True)
class InboxCounts:
    """What became of the pictures that came.

    Attributes:
        came: pictures that were put.
        dropped: those that no block was made from, because newer ones came.
        repeated: how many times one was shown again, because too few came.
        width: of the newest picture as it was decoded; 0 before there is one.
        height: likewise.
    """

    came: int = 0
    dropped: int = 0
    repeated: int = 0
    width: int = 0
    height: int = 0


class FrameInbox:
    """Holds at most as many pictures as a block takes; a newer one takes the place of the oldest. Thread-safe."""

    def __init__(self) -> None:
        self._changed = Condition()
        self._pictures: deque[torch.Tensor] = deque()
        self._room = _FIRST_ROOM
        self._fit: PictureFit | None = None
        self._newest: torch.Tensor | None = None
        self._counts = InboxCounts()

    def put(self, jpeg: bytes) -> None:
        """Take one picture; decodes and fits it here, so that the stream's thread need not.

        Raises:
            ValueError: see `decode_jpeg`.
        """
        picture = decode_jpeg(jpeg)
        height, width, _ = picture.shape
        fit = self._fit
        if fit is not None:
            picture = fit.apply(picture)
        with self._changed:
            self._pictures.append(picture)
            self._count(came=1, width=width, height=height)
            self._make_room()
            self._changed.notify_all()

    def fit_to(self, fit: PictureFit) -> None:
        """Bring pictures to the stream's size as they come; those that are here are fitted when they are taken."""
        self._fit = fit

    @property
    def counts(self) -> InboxCounts:
        """So far."""
        return self._counts

    def take(self, count: int, look: Callable[[], None]) -> torch.Tensor:
        """The newest `count` pictures in their order, uint8 [count, height, width, 3] of the stream's size.

        Fewer that came since the last call are repeated, evenly; where none came, the last one is held. Only where
        there has never been one is it waited for.

        Args:
            count: at least 1.
            look: called several times a second while this waits; raise in it to give up.
        """
        assert self._fit is not None, "fit_to comes first"
        while not self._wait_for_one():
            look()
        with self._changed:
            self._room = max(self._room, count)
            taken = list(self._pictures)[-count:]
            self._count(dropped=len(self._pictures) - len(taken))
            self._pictures.clear()
            if not taken and self._newest is not None:
                taken = [self._newest]
            self._count(repeated=count - len(taken))
        fitted = [self._fit.apply(picture) for picture in taken]
        self._newest = fitted[-1]
        return torch.stack([fitted[index * len(fitted) // count] for index in range(count)])

    def _wait_for_one(self) -> bool:
        with self._changed:
            there = bool(self._pictures) or self._newest is not None
            return there or self._changed.wait(_SECONDS_BETWEEN_LOOKS)

    def _make_room(self) -> None:
        held = sum(picture.nbytes for picture in self._pictures)
        while len(self._pictures) > self._room or (held > _MOST_BYTES and len(self._pictures) > 1):
            held -= self._pictures.popleft().nbytes
            self._count(dropped=1)

    def _count(self, *, came: int = 0, dropped: int = 0, repeated: int = 0, width: int = 0, height: int = 0) -> None:
        before = self._counts
        self._counts = InboxCounts(
            before.came + came,
            before.dropped + dropped,
            before.repeated + repeated,
            width or before.width,
            height or before.height,
        )
