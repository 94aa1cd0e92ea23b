"""A track's lines on the blocks of a stream. No torch: nodes read it."""

from __future__ import annotations

from collections.abc import Sequence

from .block_clock import BlockClock
from .placed_lines import PlacedLine, PlacedValues
from .track_lines import Moment, TrackLine


def place_lines(
    lines: Sequence[TrackLine], blocks: int | None, clock: BlockClock | None
) -> tuple[tuple[PlacedLine, ...], tuple[PlacedValues, ...]]:
    """The lines with prompts, and apart from them those that only say values; see `PromptTrack.place`.

    Raises:
        ValueError: one sentence.
    """
    placed: list[PlacedLine] = []
    values: list[PlacedValues] = []
    fresh: list[int] = []
    for line in lines:
        if not line.has_prompt:
            values.append(_place_values(line, placed, values, clock, fresh))
            continue
        one = _place_line(line, placed[-1] if placed else None, clock, fresh)
        if values:
            _check_order(line, one.start, values[-1].start, values[-1].line)
            # Of a value that both say for one block, what is written later holds.
            if values[-1].start == one.start:
                values[-1] = values[-1].without(one.line)
        placed.append(one)
        if line.cut and one.start:
            fresh.append(one.start)
    if placed:
        _check_end(placed[-1], blocks)
    if values and blocks is not None and values[-1].start >= blocks:
        raise _past_the_end(values[-1].line, values[-1].start, blocks)
    return tuple(placed), join_values(values)


def join_values(values: Sequence[PlacedValues]) -> tuple[PlacedValues, ...]:
    """Values in the order of time, one for each block; where several begin at one, the later ones hold."""
    joined: list[PlacedValues] = []
    for one in values:
        if joined and joined[-1].start == one.start:
            one = joined.pop().then(one)
        joined.append(one)
    return tuple(one for one in joined if one.strength is not None or one.attention_bias is not None)


def _place_values(
    line: TrackLine,
    placed: Sequence[PlacedLine],
    values: Sequence[PlacedValues],
    clock: BlockClock | None,
    fresh: Sequence[int],
) -> PlacedValues:
    start = 0 if line.begin is None else _block_of(line.begin, clock, fresh)
    earlier: list[PlacedLine | PlacedValues] = [*placed[-1:], *values[-1:]]
    for before in earlier:
        _check_order(line, start, before.start, before.line)
    return PlacedValues(start, line.strength, line.attention_bias, line)


def _check_order(line: TrackLine, start: int, earliest: int, before: TrackLine) -> None:
    if start < earliest:
        raise line.error(
            f"begins at block {start}, before {before.written!r} at block {earliest}: write lines in the order of time"
        )


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
    elif start < before.least_end and not line.now:
        raise line.error(
            f"begins at block {start}, and {before.line.written!r} lasts to block {before.least_end - 1}: let lines "
            "not overlap, or write 'now' behind the place to end that one there"
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
    # A transition may be longer than the stream, whose end then cuts it off: so one that is stopped can be made again.
    named = (last.end or last.start + 1) - 1
    if named >= blocks:
        raise _past_the_end(last.line, named, blocks)
    if last.end is not None and last.end < blocks:
        raise last.line.error(
            f"is the last one and leaves {_blocks_text(last.end, blocks)} without a prompt: leave out its end, or "
            f"choose {last.end} blocks"
        )


def _blocks_text(start: int, end: int) -> str:
    return f"block {start}" if end == start + 1 else f"blocks {start} to {end - 1}"


def _past_the_end(line: TrackLine, named: int, blocks: int) -> ValueError:
    return line.error(
        f"names block {named}, and the stream has {blocks}, 0 to {blocks - 1}: choose more blocks, or earlier ones "
        "in the track"
    )
