"""Does memory grow from block to block, how fast, and which owner grows?"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from .byte_text import format_bytes
from .growth_advice import RESERVED_ADVICE, advise
from .owners import Owner
from .pipeline_facts import StateAdvice
from .timeline import StageRecord, Timeline

# Counted from 0. The window of context slides from the third block on; before that, caches still fill.
FIRST_STEADY_BLOCK = 2
# A slope and its error need three points; a meaningful error needs one more.
FEWEST_POINTS = 4
# A slope counts as growth when it is more than this many standard errors above 0, over all blocks and over their later
# half: a single step (a longer prompt, another model loaded) also gives a slope, but rarely over both.
_ERRORS_FROM_ZERO = 3.0
# A slope below this adds less than 1 GiB in a million blocks.
NEGLIGIBLE_BYTES = 1024.0


@dataclass(frozen=True)
class Slope:
    """Growth per block by least squares.

    Attributes:
        bytes: per block.
        error: standard error of `bytes`.
    """

    bytes: float
    error: float

    @property
    def is_growth(self) -> bool:
        """Whether it is above the noise and not negligible."""
        return self.bytes >= NEGLIGIBLE_BYTES and self.bytes > _ERRORS_FROM_ZERO * self.error

    def __str__(self) -> str:
        # An error below a thousandth of the slope is rounding of the arithmetic.
        error = f" +- {format_bytes(self.error)}" if self.error > max(0.001 * abs(self.bytes), 0.05) else ""
        return f"{format_bytes(self.bytes)}{error}"


@dataclass(frozen=True)
class Verdict:
    """What the timeline says about growth.

    Attributes:
        word: "flat", "grows" or "too short".
        sentence: the verdict in words, with the owner that grew and what to do.
        total: slope of all memory in use; None when too short.
        owners: slope of each owner that grew, the fastest first.
        reserved: slope of what the allocator reserves; None where there is no such counter.
    """

    word: str
    sentence: str
    total: Slope | None = None
    owners: tuple[tuple[Owner, Slope], ...] = ()
    reserved: Slope | None = None

    @property
    def headline(self) -> str:
        """The verdict in a few words, for the title of a plot."""
        if not self.grows or self.total is None:
            return (
                self.sentence.partition(":")[0] if self.word == "too short" else f"{self.word}: {self.total} per block"
            )
        if not self.total.is_growth:
            return f"grows: reserved memory by {self.reserved} per block"
        who = f", {self.owners[0][0].label}" if self.owners else ""
        return f"grows: {self.total} per block{who}"

    @property
    def grows(self) -> bool:
        """Whether anything grows."""
        return self.word == "grows"


def fit_slope(blocks: Sequence[float], values: Sequence[float]) -> Slope:
    """Least-squares slope of `values` over `blocks` (three points or more) and its standard error.

    Slope b = sum((x - mean x)(y - mean y)) / sum((x - mean x)^2); its error is
    sqrt(sum(residual^2) / (n - 2) / sum((x - mean x)^2)).
    """
    count = len(blocks)
    mean_x, mean_y = math.fsum(blocks) / count, math.fsum(values) / count
    spread = math.fsum((x - mean_x) ** 2 for x in blocks)
    slope = math.fsum((x - mean_x) * (y - mean_y) for x, y in zip(blocks, values, strict=True)) / spread
    residuals = math.fsum((y - mean_y - slope * (x - mean_x)) ** 2 for x, y in zip(blocks, values, strict=True))
    return Slope(slope, math.sqrt(residuals / (count - 2) / spread))


def judge_growth(timeline: Timeline) -> Verdict:
    """Judge the blocks from the third on, by what tensors hold at the end of each."""
    ends = [end for end in timeline.block_ends if end.block is not None and end.block >= FIRST_STEADY_BLOCK]
    if len(ends) < FEWEST_POINTS:
        needed = FIRST_STEADY_BLOCK + FEWEST_POINTS
        return Verdict("too short", f"{timeline.blocks} blocks are too few to judge growth: make {needed} or more.")
    total = _slope(ends, [end.reading.held for end in ends])
    owners = growing_owners(ends)
    reserved = _reserved_slope(ends)
    if _grows(ends, [end.reading.held for end in ends], total):
        return Verdict("grows", _say_growth(total, owners, timeline.state_advice), total, owners, reserved)
    if reserved is not None and _grows(ends, [end.reading.reserved or 0 for end in ends], reserved):
        sentence = (
            f"Tensors stay flat ({total} per block), but what torch's allocator reserves grows by {reserved} per "
            f"block: {RESERVED_ADVICE}"
        )
        return Verdict("grows", sentence, total, owners, reserved)
    return Verdict("flat", f"Memory is flat: {total} per block over {len(ends)} blocks.", total, owners, reserved)


def growing_owners(ends: Sequence[StageRecord]) -> tuple[tuple[Owner, Slope], ...]:
    """Owners that grow over these block ends, with their slopes, the fastest first."""
    latest = {(owner.kind, owner.name): owner for end in ends for owner in end.owners}
    held = [{(owner.kind, owner.name): owner.bytes for owner in end.owners} for end in ends]
    found = []
    for key, owner in latest.items():
        values = [by_owner.get(key, 0) for by_owner in held]
        slope = _slope(ends, values)
        if _grows(ends, values, slope):
            found.append((owner, slope))
    return tuple(sorted(found, key=lambda pair: -pair[1].bytes))


def _say_growth(total: Slope, owners: tuple[tuple[Owner, Slope], ...], state_advice: tuple[StateAdvice, ...]) -> str:
    if not owners:
        return f"Memory grows by {total} per block, but no single owner does: look at the table by stage."
    owner, slope = owners[0]
    others = f" (and {len(owners) - 1} more)" if len(owners) > 1 else ""
    return f"Memory grows by {total} per block; {owner.label!r} grows by {slope}{others}: {advise(owner, state_advice)}"


def _grows(ends: Sequence[StageRecord], values: Sequence[float], slope: Slope) -> bool:
    half = len(ends) // 2
    later = _slope(ends[half:], values[half:]) if len(ends) - half >= FEWEST_POINTS else slope
    return slope.is_growth and later.is_growth


def _slope(ends: Sequence[StageRecord], values: Sequence[float]) -> Slope:
    return fit_slope([float(end.block or 0) for end in ends], values)


def _reserved_slope(ends: Sequence[StageRecord]) -> Slope | None:
    if any(end.reading.reserved is None for end in ends):
        return None
    return _slope(ends, [end.reading.reserved or 0 for end in ends])
