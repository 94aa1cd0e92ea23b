"""A placed track as text: plain lines where they mean the same, exact ones elsewhere."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .exact_prompts import is_changed_by_the_page, write_exact
from .placed_lines import PlacedLine, PlacedValues
from .track_lines import TrackLine, parse_line

if TYPE_CHECKING:
    from .placed_track import PlacedTrack


def write_track(track: PlacedTrack) -> str:
    """Lines with explicit blocks; a line's end is where the next one begins. See `PlacedTrack.written`."""
    lines: list[PlacedLine | PlacedValues] = [*track.lines, *track.values]
    # At one block the prompt comes first: the value behind it holds.
    lines.sort(key=lambda one: one.start)
    return "\n".join(_write_values(one) if isinstance(one, PlacedValues) else _write_line(one) for one in lines)


def _write_values(one: PlacedValues) -> str:
    return " ".join([str(one.start), *_write_numbers(one)]) + ":"


def _write_line(one: PlacedLine) -> str:
    place = f"{one.start}->{one.start + one.transition - 1}" if one.transition else str(one.start)
    numbers = _write_numbers(one.line)
    words = [*["cut"] * one.line.cut, *["now"] * one.line.now]
    plain = f"{' '.join([place, *words, *numbers])}: {_write_plain(one.line.parts)}"
    if _means_the_same(plain, one.line.parts):
        return plain
    return f"{' '.join([place, *words, 'exact', *numbers])}: {write_exact(one.line.parts)}"


def _write_numbers(said: TrackLine | PlacedValues) -> list[str]:
    # `repr` is the shortest text that is read as the same number.
    numbers = {"strength": said.strength, "bias": said.attention_bias}
    return [f"{name} {float(number)!r}" for name, number in numbers.items() if number is not None]


def _write_plain(parts: tuple[tuple[str, float], ...]) -> str:
    if len(parts) == 1:
        return parts[0][0]
    return " || ".join(f"{prompt} :{share!r}" for prompt, share in parts)


def _means_the_same(text: str, parts: tuple[tuple[str, float], ...]) -> bool:
    if len(text.splitlines()) != 1 or is_changed_by_the_page(text):
        return False
    try:
        return parse_line(1, text).parts == parts
    except ValueError:
        return False
