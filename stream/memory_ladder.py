"""What a stream does, one thing after another, when its device runs out of memory."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

logger = logging.getLogger(__name__)

# Called with the block (from 0), the stage that ran out, and the rung that was taken.
TellRung = Callable[[int, str, str], None]


def tell_nobody(block: int, stage: str, rung: str) -> None:
    """Where nobody is told."""


@dataclass(frozen=True)
class Shortage:
    """A stage that ran out of memory.

    Attributes:
        block: 0 for the first.
        stage: its name.
        takes: names of inputs of the stage, as far as they may help.
        of_text: whether it needs the text encoder, and nothing else.
        went_back: whether the state is that of before the block.
    """

    block: int
    stage: str
    takes: frozenset[str] = frozenset()
    of_text: bool = False
    went_back: bool = True


@dataclass(frozen=True)
class Rung:
    """One thing that may give a stage the memory it needs.

    Attributes:
        name: unique.
        take: does it for a shortage, and returns a clause that says what was done, and whether pictures change by it;
            empty where it is not possible now, or does not help that stage.
        once: whether it is of no use twice for one block. Others are possible a bounded number of times.
    """

    name: str
    take: Callable[[Shortage], str]
    once: bool = False


class MemoryLadder:
    """Takes one rung after each shortage, the mildest that is possible.

    For one block it ends, because no rung is possible without end. What was done stays done for the blocks that follow.
    The first rung, which changes nothing, goes last where it was taken for the block before: it helps for so long only.

    Args:
        rungs: mildest first.
        tell: is told of each that was taken.
    """

    def __init__(self, rungs: Sequence[Rung], tell: TellRung = tell_nobody) -> None:
        self._rungs = tuple(rungs)
        self._tell = tell
        self._block = -1
        self._taken: set[str] = set()
        self._first_before = -2
        # By rung: the first shortage, what was done last, how often.
        self._done: dict[str, tuple[Shortage, str, int]] = {}

    @property
    def was_climbed(self) -> bool:
        """Whether anything was done."""
        return bool(self._done)

    def climb(self, shortage: Shortage) -> bool:
        """Take the next rung; False at the end of the ladder."""
        if shortage.block != self._block:
            self._block, self._taken = shortage.block, set()
        first, *others = self._rungs
        tried = (*others, first) if self._first_before == shortage.block - 1 else self._rungs
        return any(self._take(rung, shortage) for rung in tried)

    def notices(self, device: torch.device) -> list[str]:
        """A sentence for each rung that was taken."""
        return [_sentence(device, *done) for done in self._done.values()]

    def _take(self, rung: Rung, shortage: Shortage) -> bool:
        if rung.once and rung.name in self._taken:
            return False
        done = rung.take(shortage)
        if not done:
            return False
        self._taken.add(rung.name)
        if rung is self._rungs[0]:
            self._first_before = shortage.block
        began, _, count = self._done.get(rung.name, (shortage, "", 0))
        self._done[rung.name] = began, done, count + 1
        logger.warning("block %d ran out of memory (%s): %s", shortage.block + 1, shortage.stage, done)
        self._tell(shortage.block, shortage.stage, rung.name)
        return True


def _sentence(device: torch.device, shortage: Shortage, done: str, count: int) -> str:
    again = "" if count == 1 else f", and {count - 1} more time{'s' * (count > 2)}"
    return f"{device} ran out of memory at block {shortage.block + 1} ({shortage.stage}){again}: {done}."
