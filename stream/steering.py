"""A stream's direction, as people change it while the stream runs."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

from .direction import Direction
from .live_block import MOST_DONE, NOT_LIVE, LiveBlock, Revise, Revised, ShowPart
from .live_control import LiveControl


def _nothing(*_: object) -> None:
    """Where nobody looks."""


class Steering:
    """Applies what a `LiveControl` was asked, between two blocks or by beginning one again.

    Args:
        control: filled by whoever steers; None changes nothing.
        look: called several times a second while the stream is paused; raise in it to end the stream.
        tell: called before each block with its index and the direction that it follows, and again where it is begun
            again.
        show: see `LiveBlock`.
        is_watched: whether somebody sees pictures of the block; asked before each.
        most_done: see `LiveBlock`; with 0 no block is begun again.

    Attributes:
        edited: whether the stream has followed an edit.
        begun_again: how many blocks were begun again for an edit.
        stopped: whether it was ended by hand.
    """

    def __init__(
        self,
        control: LiveControl | None = None,
        look: Callable[[], None] = _nothing,
        tell: Callable[[int, Direction], None] = _nothing,
        show: ShowPart | None = None,
        is_watched: Callable[[], bool] = lambda: False,
        most_done: float = MOST_DONE,
    ) -> None:
        self._control = control
        self._look = look
        self._tell = tell
        self._show = show
        self._is_watched = is_watched
        self._most_done = most_done
        self.edited = self.stopped = False
        self.begun_again = 0

    def blocks(self, count: int | None, first: int = 0) -> Iterator[int]:
        """The blocks to make, to the last of `count` or until somebody stops; waits where the stream is paused.

        Args:
            count: None for a stream without end.
            first: the first one to make: those before it are made.
        """
        for index in itertools.count(first) if count is None else range(first, count):
            if self._control is not None:
                self._control.wait_while_paused(self._look)
                # The first block is made: what is kept cannot be nothing.
                if index and self._control.is_stopped:
                    self.stopped = True
                    return
            yield index

    def direct(self, index: int, direction: Direction) -> Direction:
        """What block `index` and those behind it follow: `direction`, with the edits that wait."""
        edit = None if self._control is None else self._control.take_edit()
        if edit is not None and edit.values():
            direction = direction.with_edit(index, edit)
            self.edited = True
        self._tell(index, direction)
        return direction

    def live_block(self, revise: Revise) -> LiveBlock:
        """How people take part in the next block; where nobody looks, an edit is early enough in the one after it.

        Args:
            revise: says what the block is made of when it is begun again; asks `direct` for that.
        """
        if not self._is_watched():
            return NOT_LIVE
        if self._control is None or not self._most_done:
            return LiveBlock(self._show)
        control = self._control

        def begin_again() -> Revised:
            self.begun_again += 1
            return revise()

        return LiveBlock(self._show, lambda: control.has_edit, begin_again, self._most_done)
