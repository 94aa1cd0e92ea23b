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
    if block and prompt is not None and not track.lines:
        raise ValueError(
            f"the track has no prompts and an edit at block {block} gives it one: give block 0 its prompt first."
        )
    said = TrackLine(0, "", (), Moment(float(block)), strength=strength, attention_bias=attention_bias)
    # Apart from the prompt also where both are given: the next planned line ends the prompt, and not the values.
    values = sorted((*track.values, PlacedValues(block, strength, attention_bias, said)), key=_start)
    lines = track.lines if prompt is None else _with_prompt(track.lines, block, prompt)
    return replace(track, lines=lines, values=join_values(values))


def _with_prompt(lines: tuple[PlacedLine, ...], block: int, prompt: str) -> tuple[PlacedLine, ...]:
    planned = next((one.line for one in lines if one.start == block), None)
    # Only a line that was not planned says nothing of values, so that they go on as planned.
    kept = TrackLine(0, "", (), now=block > 0) if planned is None else planned
    line = TrackLine(
        0,
        shorten(f"{block}: {prompt}"),
        ((prompt, 1.0),),
        Moment(float(block)),
        cut=kept.cut,
        now=kept.now,
        strength=kept.strength,
        attention_bias=kept.attention_bias,
    )
    others = (one for one in lines if one.start != block)
    return tuple(sorted((*others, PlacedLine(line, block, 0, None)), key=_start))


def _start(one: PlacedLine | PlacedValues) -> int:
    return one.start
