"""What an edit of a running stream makes of its track: a line more, or another line in the place of one."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from .placed_lines import PlacedLine, PlacedValues
from .track_lines import Moment, TrackLine, shorten
from .track_placing import join_values

if TYPE_CHECKING:
    from .placed_track import PlacedTrack


def edited(
    track: PlacedTrack, block: int, *, prompt: str | None, strength: float | None, attention_bias: float | None
) -> PlacedTrack:
    """The track with other values from a block on.

    A prompt holds until the next line with a prompt begins, and ends a transition that is under way. A line that begins
    at the very block keeps its cut and its values, and comes in at once. Strength and bias hold until a later line says
    another. Of several edits at one block the last holds.

    Args:
        track: stays as it is.
        block: the first one that is made so.
        prompt: taken as it is, not mixed; None leaves prompts as planned.
        strength: how much of an input video is replaced, 0..1; None leaves it as planned.
        attention_bias: weight of past frames, above 0 and up to 1; None leaves it as planned.

    Raises:
        ValueError: a prompt behind block 0 for a track without prompts: the blocks before it would have none.
    """
    said = TrackLine(0, "", (), Moment(float(block)), strength=strength, attention_bias=attention_bias)
    if prompt is None:
        values = sorted((*track.values, PlacedValues(block, strength, attention_bias, said)), key=_start)
        return replace(track, values=join_values(values))
    if block and not track.lines:
        raise ValueError(
            f"the track has no prompts and an edit at block {block} gives it one: give block 0 its prompt first."
        )
    said = replace(said, written=shorten(f"{block}: {prompt}"), parts=((prompt, 1.0),))
    lines = sorted((*(one for one in track.lines if one.start != block), _edited_line(track, block, said)), key=_start)
    values = [one.without(said) if one.start == block else one for one in track.values]
    return replace(track, lines=tuple(lines), values=join_values(values))


def _edited_line(track: PlacedTrack, block: int, said: TrackLine) -> PlacedLine:
    planned = next((one.line for one in track.lines if one.start == block), None)
    if planned is None:
        return PlacedLine(replace(said, now=block > 0), block, 0, None)
    kept = replace(
        said,
        cut=planned.cut,
        now=planned.now,
        strength=planned.strength if said.strength is None else said.strength,
        attention_bias=planned.attention_bias if said.attention_bias is None else said.attention_bias,
    )
    return PlacedLine(kept, block, 0, None)


def _start(one: PlacedLine | PlacedValues) -> int:
    return one.start
