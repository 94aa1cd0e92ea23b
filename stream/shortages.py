"""Work that is done again when the device runs out of memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar

import torch

from ..memory.cleanup import release_cached_memory
from ..memory.error_locals import clearing_error_locals
from .failed_stage import find_failed_stage
from .live_block import BlockGivenUpError
from .memory_ladder import MemoryLadder, Shortage
from .memory_rungs import Adjustable
from .stream_pipeline import StreamPipeline

R = TypeVar("R")


class Shortages:
    """Does work again after each rung of a stream's memory ladder, and raises at its end.

    Args:
        pipeline: of the stream.
        ladder: of the stream.
    """

    def __init__(self, pipeline: StreamPipeline, ladder: MemoryLadder) -> None:
        self._pipeline = pipeline
        self._ladder = ladder
        self._failed_at: tuple[str, frozenset[str]] = ("", frozenset())

    def notices(self) -> list[str]:
        """See `MemoryLadder.notices`."""
        return self._ladder.notices(self._pipeline.device)

    def survive(
        self,
        block: int,
        stage: str,
        work: Callable[[], R],
        *,
        of_text: bool = False,
        takes: frozenset[str] = frozenset(),
    ) -> R:
        """Do work that can be done again, until the device has the memory for it.

        Args:
            block: see `Shortage`.
            stage: see `Shortage`.
            work: changes nothing before it is done.
            of_text: see `Shortage`.
            takes: see `Shortage`.

        Raises:
            torch.OutOfMemoryError: at the end of the ladder.
        """
        shortage = Shortage(block, stage, takes, of_text)
        while True:
            try:
                return _do(work)
            except torch.OutOfMemoryError as error:
                failed = error
            release_cached_memory(self._pipeline.device)
            if not self._climb(shortage):
                raise failed
            del failed

    def make(self, call: Callable[[], R], session: Adjustable, generator: torch.Generator, block: int) -> R:
        """Call the pipeline for a block, again from the same state when the device runs out of memory.

        Args:
            call: of the pipeline, with the session's state and settings as they are then.
            session: whose state goes back before each call but the first.
            generator: of the stream's noise, which goes back too.
            block: 0 for the first.

        Raises:
            torch.OutOfMemoryError: at the end of the ladder, or where there is no way back.
            BlockGivenUpError: the call raised it, and the state is that of before the block.
        """
        while True:
            way = self._pipeline.saving.way_back(ran_out=self._ladder.was_climbed)
            rewind = session.state.remember(way)
            noise = generator.get_state()
            try:
                return self._call(call)
            except BlockGivenUpError:
                if not rewind():
                    raise RuntimeError("a block was given up that cannot be undone.") from None
                generator.set_state(noise)
                raise
            except torch.OutOfMemoryError as error:
                failed = error
            # Not while the error is handled: what its handler knows would stay alive.
            self._go_back(failed, Shortage(block, *self._failed_at), rewind)
            del failed, rewind
            generator.set_state(noise)

    @clearing_error_locals
    def _call(self, call: Callable[[], R]) -> R:
        try:
            return call()
        except torch.OutOfMemoryError as error:
            self._failed_at = find_failed_stage(error, self._pipeline.pipe)
            raise

    def _go_back(self, failed: torch.OutOfMemoryError, shortage: Shortage, rewind: Callable[[], bool]) -> None:
        """Bring the state back to before a block that failed, and have more memory for it.

        Args:
            failed: by which.
            shortage: of the block.
            rewind: see `StreamState.remember`; may itself run out of memory, and is called again then.

        Raises:
            torch.OutOfMemoryError: `failed`, at the end of the ladder, or where there is no way back.
        """
        if not self._pipeline.saving.can_make_again:
            raise failed
        went_back = None
        while went_back is None:
            release_cached_memory(self._pipeline.device)
            try:
                went_back = rewind()
            except torch.OutOfMemoryError:
                went_back = None
            is_back = went_back is True
            if went_back is False or not self._climb(replace(shortage, went_back=is_back)):
                raise failed

    def _climb(self, shortage: Shortage) -> bool:
        try:
            climbed = self._ladder.climb(shortage)
        except torch.OutOfMemoryError:
            # A rung that itself has no room, such as slots for layers to be streamed.
            return False
        release_cached_memory(self._pipeline.device)
        return climbed


@clearing_error_locals
def _do(work: Callable[[], R]) -> R:
    return work()
