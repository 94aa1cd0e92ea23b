"""Lines of a track on the blocks of a stream, and how a value that they say moves over the blocks."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from .track_lines import TrackLine


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
        """The first block that the next line may have, unless that one says `now`."""
        return self.end or self.start + max(1, self.transition)


@dataclass(frozen=True)
class PlacedValues:
    """Values that hold from a block on, until a later line says others.

    Attributes:
        start: the block.
        strength: of the input video; None leaves it as planned.
        attention_bias: None leaves it as planned.
        line: that says them, for messages; the newest, where several do.
    """

    start: int
    strength: float | None
    attention_bias: float | None
    line: TrackLine = field(compare=False)

    def without(self, later: TrackLine) -> PlacedValues:
        """Those that `later`, a line at the same block, does not say."""
        return replace(
            self,
            strength=self.strength if later.strength is None else None,
            attention_bias=self.attention_bias if later.attention_bias is None else None,
        )

    def then(self, later: PlacedValues) -> PlacedValues:
        """Both; of two values for one thing the later holds."""
        return replace(
            later,
            strength=self.strength if later.strength is None else later.strength,
            attention_bias=self.attention_bias if later.attention_bias is None else later.attention_bias,
        )


@dataclass(frozen=True)
class ValueStep:
    """Where a value becomes another.

    Attributes:
        start: the first block.
        value: that it comes to; None is the one that the track does not say.
        over: how many blocks it takes, in equal steps; 0 for at once.
    """

    start: int
    value: float | None
    over: int = 0


@dataclass(frozen=True)
class SteppedValue:
    """A value over the blocks of a stream."""

    steps: tuple[ValueStep, ...]

    @classmethod
    def of(cls, name: str, lines: Sequence[PlacedLine], values: Sequence[PlacedValues]) -> SteppedValue:
        """The value `name` of `PlacedValues`, as lines with and without prompts say it."""
        steps: list[ValueStep] = []
        is_held = False
        # Sorting keeps the order at one block: prompts first.
        every: list[PlacedLine | PlacedValues] = [*lines, *values]
        for one in sorted(every, key=lambda one: one.start):
            if isinstance(one, PlacedValues):
                said: float | None = getattr(one, name)
                if said is None:
                    continue
                is_held = True
                if steps and steps[-1].start == one.start:
                    steps.pop()
                steps.append(ValueStep(one.start, said))
                continue
            said = getattr(one.line, name)
            if said is not None or not (is_held or (one.line.now and steps)):
                is_held = False
                steps.append(ValueStep(one.start, said, one.transition))
        return cls(tuple(steps))

    @property
    def said(self) -> tuple[float, ...]:
        """Every value that is said."""
        return tuple(step.value for step in self.steps if step.value is not None)

    def at(self, block: int, otherwise: float) -> float:
        """The value in a block, `otherwise` where none is said."""
        place = bisect_right(self._starts, block) - 1
        if place < 0:
            return otherwise
        # A step that was not over before the next one began leaves what was reached.
        first = place
        while first and self._share(first, place, block) < 1.0:
            first -= 1
        reached = self._target(first, otherwise)
        for index in range(first + 1, place + 1):
            reached += (self._target(index, otherwise) - reached) * self._share(index, place, block)
        return reached

    def _share(self, index: int, place: int, block: int) -> float:
        """How far a step has come when the next one begins; the step at `place`, in `block`."""
        step = self.steps[index]
        done = (block + 1 if index == place else self._starts[index + 1]) - step.start
        return min(1.0, done / step.over) if step.over else 1.0

    def _target(self, index: int, otherwise: float) -> float:
        value = self.steps[index].value
        return otherwise if value is None else value

    @cached_property
    def _starts(self) -> Sequence[int]:
        return [step.start for step in self.steps]
