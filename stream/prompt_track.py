"""Prompts over time: a track of lines, and the track on the blocks of one stream. No torch: nodes read it."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from .block_clock import BlockClock
from .block_prompt import INTERPOLATIONS, LINEAR, BlockPrompt, mix_shares
from .track_lines import Moment, TrackLine, parse_line, parse_prompts, shorten

MOST_LINES = 10_000
_COMMENT = "#"


@dataclass(frozen=True)
class PromptTrack:
    """What a stream shows, over time; see `track_lines` for how it is written.

    Attributes:
        lines: in the order of time.
        interpolation: how embeddings are mixed, one of `INTERPOLATIONS`.
    """

    lines: tuple[TrackLine, ...] = ()
    interpolation: str = LINEAR

    def __post_init__(self) -> None:
        """Check what can be checked without a stream.

        Raises:
            ValueError: one sentence.
        """
        if self.interpolation not in INTERPOLATIONS:
            raise ValueError(f"interpolation is {self.interpolation!r}: choose one of {', '.join(INTERPOLATIONS)}.")
        if len(self.lines) > MOST_LINES:
            raise ValueError(f"the track has {len(self.lines)} lines: write at most {MOST_LINES}.")
        if self.lines:
            self.check(None)

    @property
    def is_mixed(self) -> bool:
        """Whether any block mixes prompts."""
        return any(line.is_transition or line.transition_blocks or len(line.parts) > 1 for line in self.lines)

    @property
    def begins_with_a_cut(self) -> bool:
        """Whether its first block sees nothing of an earlier stream."""
        return bool(self.lines) and self.lines[0].cut

    def check(self, blocks: int | None) -> None:
        """Raise what `place` would, as far as that is known without a clock; nothing for a track in seconds."""
        moments = (moment for line in self.lines for moment in (line.begin, line.end) if moment is not None)
        if not any(moment.in_seconds for moment in moments):
            self.place(blocks, None)

    @classmethod
    def parse(cls, text: str, interpolation: str = LINEAR) -> PromptTrack:
        """Read a track; empty lines and lines that begin with `#` say nothing.

        Raises:
            ValueError: one sentence that names the line and what to write.
        """
        numbered = [(number, line.strip()) for number, line in enumerate(text.splitlines(), 1)]
        said = [(number, line) for number, line in numbered if line and not line.startswith(_COMMENT)]
        if not said:
            raise ValueError("the track has no line: write one such as '0: a calm sea'.")
        if len(said) > MOST_LINES:
            raise ValueError(f"the track has {len(said)} lines: write at most {MOST_LINES}.")
        return cls(tuple(parse_line(number, line) for number, line in said), interpolation)

    def then(self, prompt: str, blocks: int = 0, *, transition: int = 0, cut: bool = False) -> PromptTrack:
        """The track with one more line, which begins where this one ends.

        Args:
            prompt: or several with weights.
            blocks: how long it lasts; 0 for to the end of the stream.
            transition: over how many of these blocks it comes in; 0 for at once.
            cut: whether it begins with a hard cut.

        Raises:
            ValueError: one sentence.
        """
        number = 1 + (self.lines[-1].number if self.lines else 0)
        length = f" for {blocks} blocks" if blocks else ""
        line = TrackLine(
            number,
            shorten(f"then{length}: {prompt}"),
            (),
            cut=cut,
            blocks=blocks or None,
            transition_blocks=transition,
        )
        if blocks < 0 or transition < 0:
            raise line.error(f"has {blocks} blocks and a transition of {transition}: choose 0 or more")
        if transition and cut:
            raise line.error("is a transition and a cut: choose one of them")
        return replace(self, lines=(*self.lines, replace(line, parts=parse_prompts(line, prompt))))

    def place(self, blocks: int | None, clock: BlockClock | None) -> PlacedTrack:
        """The track on the blocks of a stream.

        Args:
            blocks: of the stream; None for one without end.
            clock: needed for lines in seconds.

        Raises:
            ValueError: lines overlap, go backwards, leave blocks without a prompt or name a block past the end; a
                transition has nothing to come from, or is shorter than two blocks.
        """
        if not self.lines:
            raise ValueError("the track has no line: write one such as '0: a calm sea'.")
        placed: list[PlacedLine] = []
        fresh: list[int] = []
        for line in self.lines:
            placed.append(_place_line(line, placed[-1] if placed else None, clock, fresh))
            if line.cut and placed[-1].start:
                fresh.append(placed[-1].start)
        _check_end(placed[-1], blocks)
        return PlacedTrack(tuple(placed), self.interpolation)


@dataclass(frozen=True)
class PlacedLine:
    """A line on the blocks of a stream.

    Attributes:
        line: as it was written.
        start: its first block.
        transition: how many blocks the prompts come in over; 0 for at once.
        end: the first block behind it; None until the next line begins.
    """

    line: TrackLine
    start: int
    transition: int
    end: int | None

    @property
    def least_end(self) -> int:
        """The first block that the next line may have."""
        return self.end or self.start + max(1, self.transition)


@dataclass(frozen=True)
class PlacedTrack:
    """A track on the blocks of one stream."""

    lines: tuple[PlacedLine, ...]
    interpolation: str

    @cached_property
    def texts(self) -> tuple[str, ...]:
        """Every prompt once, in order."""
        return tuple(dict.fromkeys(text for one in self.lines for text, _ in one.line.parts))

    @property
    def is_mixed(self) -> bool:
        """Whether any block mixes prompts."""
        return any(one.transition or len(one.line.parts) > 1 for one in self.lines)

    def at(self, block: int) -> BlockPrompt:
        """What a block shows; behind the last line's end, what that line does."""
        place = bisect_right(self._starts, block) - 1
        one = self.lines[max(0, place)]
        cut = one.line.cut and block == one.start
        step = block - one.start
        if step >= one.transition:
            return BlockPrompt(one.line.parts, self.interpolation, cut)
        before = self.lines[place - 1].line.parts
        start, end = (mix_shares(before, one.line.parts, done / one.transition) for done in (step, step + 1))
        return BlockPrompt(end, self.interpolation, coming_from=start)

    @property
    def has_strength(self) -> bool:
        """Whether any line says how much of an input video is replaced."""
        return any(one.line.strength is not None for one in self.lines)

    def strength_at(self, block: int, otherwise: float) -> float:
        """How much of an input video a block replaces; in a transition, in equal steps.

        Args:
            block: of the stream.
            otherwise: for lines that do not say.
        """
        place = max(0, bisect_right(self._starts, block) - 1)
        one = self.lines[place]
        strength, before = (
            otherwise if line.strength is None else line.strength
            for line in (one.line, self.lines[max(0, place - 1)].line)
        )
        share = min(1.0, (block - one.start + 1) / one.transition) if one.transition else 1.0
        return before + (strength - before) * share

    def describe(self) -> dict[str, str]:
        """Each line's prompt by its blocks, such as "4->7" for a transition and what follows it, as text output."""
        ends = [*(one.start for one in self.lines[1:]), self.lines[-1].end]
        return {
            _describe_blocks(one, end): BlockPrompt(one.line.parts, self.interpolation).name
            for one, end in zip(self.lines, ends, strict=True)
        }

    @property
    def cuts(self) -> tuple[int, ...]:
        """The blocks that begin with a hard cut."""
        return tuple(one.start for one in self.lines if one.line.cut)

    @cached_property
    def _starts(self) -> Sequence[int]:
        return [one.start for one in self.lines]


def _place_line(
    line: TrackLine, before: PlacedLine | None, clock: BlockClock | None, fresh: Sequence[int]
) -> PlacedLine:
    if line.begin is None:
        start, end = _start_behind(line, before), None
        end = None if line.blocks is None else start + line.blocks
        transition = line.transition_blocks
        if end is not None and start + transition > end:
            raise line.error(f"has a transition of {transition} blocks in {line.blocks}: choose at most that many")
    else:
        start, end = _block_of(line.begin, clock, fresh), _end_of(line, clock, fresh)
        if end is not None and end <= start:
            raise line.error(_why_empty(line, clock))
        transition = end - start if line.is_transition and end is not None else 0
        end = None if line.is_transition else end
    _check_join(line, start, before)
    if line.is_transition or line.transition_blocks:
        if before is None:
            raise line.error("is a transition from nothing: begin the track with a prompt, such as '0: a calm sea'")
        if transition < 2:
            raise line.error(
                "is a transition within one block, which is none: let it take 2 blocks or more, or write a plain line"
            )
    return PlacedLine(line, start, transition, end)


def _start_behind(line: TrackLine, before: PlacedLine | None) -> int:
    if before is None:
        return 0
    if before.end is None:
        raise line.error(
            f"begins where {before.line.written!r} ends, which has no end: give that one a last block or a number of "
            "blocks"
        )
    return before.end


def _block_of(moment: Moment, clock: BlockClock | None, fresh: Sequence[int]) -> int:
    if not moment.in_seconds:
        return int(moment.value)
    assert clock is not None
    return clock.nearest_block(moment.value, fresh)


def _end_of(line: TrackLine, clock: BlockClock | None, fresh: Sequence[int]) -> int | None:
    """The first block behind a line: blocks are named with the last one, and seconds end where the next begins."""
    if line.end is None:
        return None
    if not line.end.in_seconds:
        return int(line.end.value) + 1
    start = 0 if line.begin is None else _block_of(line.begin, clock, fresh)
    return _block_of(line.end, clock, [*fresh, start] if line.cut and start else fresh)


def _why_empty(line: TrackLine, clock: BlockClock | None) -> str:
    if line.begin and line.end and line.begin.in_seconds and line.begin.value < line.end.value and clock:
        block = clock.others / clock.fps
        return f"is shorter than a block, which takes {block:.4g} seconds: make it longer, or leave it out"
    return "ends before it begins: write the earlier end first"


def _check_join(line: TrackLine, start: int, before: PlacedLine | None) -> None:
    if before is None:
        if start:
            raise line.error(f"is the first and begins at block {start}: begin with block 0, such as '0: a calm sea'")
    elif start <= before.start:
        raise line.error(
            f"begins at block {start}, not behind {before.line.written!r} at block {before.start}: write lines in the "
            "order of time, each at a later block"
        )
    elif start < before.least_end:
        raise line.error(
            f"begins at block {start}, and {before.line.written!r} lasts to block {before.least_end - 1}: let lines "
            "not overlap"
        )
    elif before.end is not None and start > before.end:
        missing = _blocks_text(before.end, start)
        raise line.error(
            f"leaves {missing} without a prompt: begin it at block {before.end}, or leave out the end "
            "of the line before"
        )


def _check_end(last: PlacedLine, blocks: int | None) -> None:
    if blocks is None:
        return
    named = max(last.least_end, last.start + 1) - 1
    if named >= blocks:
        raise last.line.error(
            f"names block {named}, and the stream has {blocks}, 0 to {blocks - 1}: choose more blocks, or earlier ones "
            "in the track"
        )
    if last.end is not None and last.end < blocks:
        raise last.line.error(
            f"is the last one and leaves {_blocks_text(last.end, blocks)} without a prompt: leave out its end, or "
            f"choose {last.end} blocks"
        )


def _blocks_text(start: int, end: int) -> str:
    return f"block {start}" if end == start + 1 else f"blocks {start} to {end - 1}"


def _describe_blocks(one: PlacedLine, end: int | None) -> str:
    cut = " cut" if one.line.cut else ""
    if one.transition:
        return f"{one.start}->{one.start + one.transition - 1}"
    last = "" if end is None else str(end - 1)
    return f"{one.start}{cut}" if last == str(one.start) else f"{one.start}-{last}{cut}"
