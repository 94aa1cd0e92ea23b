"""Whose picture is decoded: one at a time, and of those that come meanwhile only the newest."""

from __future__ import annotations

import asyncio
from collections.abc import Callable


class FrameTurns:
    """The pictures of one stream, on a server's loop: one is decoded, one waits, and a newer one takes its place."""

    def __init__(self) -> None:
        self._is_taken = False
        self._next: asyncio.Future[bool] | None = None

    async def run(self, decode: Callable[[], None]) -> bool:
        """Decode a picture in the loop's executor once it is its turn; whether it was, and no newer one came.

        Raises:
            ValueError: as `decode` does.
        """
        if not await self._wait():
            return False
        try:
            await asyncio.get_running_loop().run_in_executor(None, decode)
        finally:
            self._hand_on()
        return True

    async def _wait(self) -> bool:
        if not self._is_taken:
            self._is_taken = True
            return True
        if self._next is not None and not self._next.done():
            self._next.set_result(False)
        self._next = turn = asyncio.get_running_loop().create_future()
        try:
            return await turn
        except asyncio.CancelledError:
            # The page went just when it was its turn.
            if turn.done() and not turn.cancelled() and turn.result():
                self._hand_on()
            raise

    def _hand_on(self) -> None:
        turn, self._next = self._next, None
        self._is_taken = turn is not None and not turn.done()
        if self._is_taken and turn is not None:
            turn.set_result(True)
