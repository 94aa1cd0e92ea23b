"""A prompt track on the blocks of one stream. No torch: nodes read it."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from .block_prompt import BlockPrompt, mix_shares
from .placed_lines import PlacedLine, PlacedValues, SteppedValue
from .track_edits import edited
from .track_writing import write_track


@dataclass(frozen=True)
class PlacedTrack:
    """A track on the blocks of one stream.

    Attributes:
        lines: those with prompts, each at a later block; none where the prompt comes from elsewhere.
        interpolation: how embeddings are mixed.
        values: of lines without a prompt, each at a later block.
    """

    lines: tuple[PlacedLine, ...]
    interpolation: str
    values: tuple[PlacedValues, ...] = ()

    @cached_property
    def texts(self) -> tuple[str, ...]:
        """Every prompt once, in order."""
        return tuple(dict.fromkeys(text for one in self.lines for text, _ in one.line.parts))

    @property
    def has_prompts(self) -> bool:
        """Whether it says what blocks show."""
        return bool(self.lines)

    @property
    def is_mixed(self) -> bool:
        """Whether any block mixes prompts."""
        return any(one.transition or len(one.line.parts) > 1 for one in self.lines)

    def at(self, block: int) -> BlockPrompt:
        """What a block shows; behind the last line's end, what that line does.

        Raises:
            ValueError: the track has no prompts.
        """
        if not self.lines:
            raise ValueError("the track has no prompts, only values: take the prompt from elsewhere.")
        place = max(0, bisect_right(self._starts, block) - 1)
        one = self.lines[place]
        cut = one.line.cut and block == one.start
        step = block - one.start
        if step >= one.transition:
            return BlockPrompt(one.line.parts, self.interpolation, cut)
        before = self._before[place]
        start, end = (mix_shares(before, one.line.parts, done / one.transition) for done in (step, step + 1))
        return BlockPrompt(end, self.interpolation, coming_from=start)

    def next_line(self, block: int) -> tuple[int, str] | None:
        """The first block behind `block` at which a line with another prompt begins, and that prompt."""
        place = bisect_right(self._starts, block)
        shown = self.lines[max(0, place - 1)].line.parts if self.lines else ()
        later = (one for one in self.lines[place:] if one.line.parts != shown)
        return next(((one.start, BlockPrompt(one.line.parts, self.interpolation).name) for one in later), None)

    @property
    def has_strength(self) -> bool:
        """Whether any line says how much of an input video is replaced."""
        return bool(self._strength.said)

    @property
    def has_bias(self) -> bool:
        """Whether any line says the weight of past frames."""
        return bool(self._bias.said)

    @property
    def least_bias(self) -> float:
        """The smallest weight of past frames that a line says; 1 where none does."""
        return min(self._bias.said, default=1.0)

    def strength_at(self, block: int, otherwise: float) -> float:
        """How much of an input video a block replaces; in a transition, in equal steps.

        Args:
            block: of the stream.
            otherwise: for lines that do not say.
        """
        return self._strength.at(block, otherwise)

    def bias_at(self, block: int, otherwise: float) -> float:
        """The attention's weight on past frames in a block; in a transition, in equal steps.

        Args:
            block: of the stream.
            otherwise: for lines that do not say.
        """
        return self._bias.at(block, otherwise)

    def with_edit(
        self,
        block: int,
        *,
        prompt: str | None = None,
        strength: float | None = None,
        attention_bias: float | None = None,
    ) -> PlacedTrack:
        """The track with one edit; see `track_edits.edited`."""
        return edited(self, block, prompt=prompt, strength=strength, attention_bias=attention_bias)

    def until(self, blocks: int) -> PlacedTrack:
        """The track of a stream that ended after so many blocks: without the lines behind it. At least 1.

        A transition that was under way stays as it was planned, so that its blocks show as much of it.
        """
        lines = self.lines[: bisect_left(self._starts, blocks)]
        values = tuple(one for one in self.values if one.start < blocks)
        is_whole = len(lines) == len(self.lines) and len(values) == len(self.values)
        return self if is_whole else replace(self, lines=lines, values=values)

    def written(self) -> str:
        """Its text, which `PromptTrack.parse` reads and places as the same track."""
        return write_track(self)

    def describe(self) -> dict[str, str]:
        """Each line's prompt by its blocks, such as "4->7" for a transition and what follows it, as text output."""
        ends = [*(one.start for one in self.lines[1:]), *(one.end for one in self.lines[-1:])]
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

    @cached_property
    def _before(self) -> Sequence[tuple[tuple[str, float], ...]]:
        """Of each line, what its transition comes from: where the one before was ended early, what was reached."""
        before: list[tuple[tuple[str, float], ...]] = []
        reached: tuple[tuple[str, float], ...] = ()
        for index, one in enumerate(self.lines):
            before.append(reached)
            length = self._starts[index + 1] - one.start if index + 1 < len(self.lines) else one.transition
            is_ended = length < one.transition
            reached = mix_shares(reached, one.line.parts, length / one.transition) if is_ended else one.line.parts
        return before

    @cached_property
    def _strength(self) -> SteppedValue:
        return SteppedValue.of("strength", self.lines, self.values)

    @cached_property
    def _bias(self) -> SteppedValue:
        return SteppedValue.of("attention_bias", self.lines, self.values)


def _describe_blocks(one: PlacedLine, end: int | None) -> str:
    cut = " cut" if one.line.cut else ""
    if one.transition:
        return f"{one.start}->{one.start + one.transition - 1}"
    last = "" if end is None else str(end - 1)
    return f"{one.start}{cut}" if last == str(one.start) else f"{one.start}-{last}{cut}"
