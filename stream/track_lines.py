"""One line of a prompt track: when, and which prompts.

0-3: a calm sea                           blocks 0 to 3
4: storm                                  from block 4 until the next line begins; `4-:` is the same
8->11: calm again                         a transition: each of the blocks 8 to 11 takes a quarter more of it
12 cut: a street at night                 a hard cut: nothing of the past is seen
2.5s-4s: fog                              in seconds, at the nearest block
16: a cat :0.7 || a dog :0.3              several prompts with weights
20 strength 0.4: a robot                  from there on, how much of the input video is replaced
24 bias 0.3: a robot                      from there on, the attention's weight on past frames
28 now: a storm                           may begin within what is before, which ends there
32 exact: "two\\nlines || of text"         the prompt is a JSON string, taken as it is; see `exact_prompts`
36 strength 0.2 bias 1:                   no prompt: from there on only these values are others
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace

from .block_prompt import shares_of
from .exact_prompts import read_exact

_SHOWN_LETTERS = 60
_MOST_LOOKED_AT = 10_000
# For each repeated word the pattern remembers a way back.
_LONGEST_PLACE = 100_000
_NUMBER = r"(\d{1,9}(?:\.\d{1,9})?)\s*(s?)"
_WORD = r"cut|(?:now|exact)(?!\w)|(?:strength|bias)\s+\S+(?!\S)"
_WORDS = re.compile(_WORD, re.IGNORECASE)
_PLACE = re.compile(rf"^{_NUMBER}\s*(?:(->|-)\s*(?:{_NUMBER})?)?\s*((?:(?:{_WORD})\s*)*)$", re.IGNORECASE)
SEPARATOR = "||"
# A colon behind a space, then what is meant as a number: `16:9` and `(word:1.2)` are parts of prompts.
_WEIGHT = re.compile(r"^(.*?)\s:\s*([-+]?(?:[\d.]\S*|nan|inf|infinity))$", re.IGNORECASE | re.DOTALL)


@dataclass(frozen=True)
class Moment:
    """A block, or a time in seconds."""

    value: float
    in_seconds: bool = False


@dataclass(frozen=True)
class TrackLine:
    """One line of a track.

    Attributes:
        number: of the line, from 1.
        written: what the user wrote, shortened.
        parts: prompts with their shares; see `BlockPrompt`. None of a line that only says other values.
        begin: None for where the line before ends.
        end: where it ends, or where its transition does; None for none.
        is_transition: whether the prompts come in little by little until `end`.
        cut: whether it begins with a hard cut.
        blocks: how long it is, for a line without `begin`; None until the next one begins.
        transition_blocks: of these, how many its transition takes, for a line without `begin`.
        strength: how much of an input video is replaced, 0..1; None leaves it to the sampler.
        attention_bias: weight of past frames, above 0 and up to 1; None leaves it to the sampler.
        now: whether it may begin within what is before, which ends there. Values that it does not say go on as planned.
    """

    number: int
    written: str
    parts: tuple[tuple[str, float], ...]
    begin: Moment | None = None
    end: Moment | None = None
    is_transition: bool = False
    cut: bool = False
    blocks: int | None = None
    transition_blocks: int = 0
    strength: float | None = None
    attention_bias: float | None = None
    now: bool = False

    @property
    def has_prompt(self) -> bool:
        """Whether it says what blocks show, and not only other values."""
        return bool(self.parts)

    def error(self, what: str) -> ValueError:
        """The error that this line `what`."""
        return ValueError(f"line {self.number} of the track, {self.written!r}, {what}.")


def parse_line(number: int, text: str) -> TrackLine:
    """Read one line that is neither empty nor a comment.

    Raises:
        ValueError: one sentence that names the line and what to write.
    """
    text = text.strip()
    line = TrackLine(number, shorten(text), ())
    place, colon, prompt = text.partition(":")
    # One space for many: the pattern tries each way to share them out among its parts.
    place = " ".join(place.split())
    found = _PLACE.match(place.strip()) if len(place) <= _LONGEST_PLACE else None
    if not colon or found is None:
        raise line.error(
            "does not say when: begin it with blocks or seconds and a colon, such as '0-3:', '4:', '8->11:', "
            "'2.5s-4s:' or '4 cut:'"
        )
    first, first_unit, arrow, last, last_unit, _ = found.groups()
    words = _read_words(line, found.group(6))
    # In `0-3.5s` the unit counts for both.
    in_seconds = bool(first_unit or last_unit)
    if first_unit and last is not None and not last_unit:
        raise line.error(f"mixes seconds and blocks: write '{first}s{arrow}{last}s:' or '{first}{arrow}{last}:'")
    moments = [None if value is None else Moment(float(value), in_seconds) for value in (first, last)]
    if not in_seconds and any(moment is not None and moment.value % 1 for moment in moments):
        raise line.error("names a part of a block: write whole blocks, or seconds with an s, such as '2.5s:'")
    is_transition = arrow == "->"
    if is_transition and last is None:
        raise line.error(f"does not say where its transition ends: write '{shorten(place)} 12:', for instance")
    if is_transition and "cut" in words:
        raise line.error("is a transition and a cut: choose one of them")
    line = replace(
        line,
        begin=moments[0],
        end=moments[1],
        is_transition=is_transition,
        cut="cut" in words,
        now="now" in words,
        strength=_read_strength(line, words["strength"]) if "strength" in words else None,
        attention_bias=_read_bias(line, words["bias"]) if "bias" in words else None,
    )
    if "exact" in words:
        return replace(line, parts=_parse_exact(line, prompt))
    if not prompt.strip() and ("strength" in words or "bias" in words):
        return _check_values(line)
    return replace(line, parts=parse_prompts(line, prompt))


def _read_words(line: TrackLine, text: str) -> dict[str, str]:
    """What stands between place and colon: each word with what follows it."""
    words: dict[str, str] = {}
    for found in _WORDS.findall(text):
        named, *value = found.split()
        word = named.lower()
        if word in words:
            raise line.error(f"says {word} twice: say it once")
        words[word] = value[0] if value else ""
    return words


def _read_strength(line: TrackLine, written: str) -> float:
    strength = _read_number(written)
    if not 0.0 <= strength <= 1.0:
        raise line.error(f"has the strength {shorten(written)}: give 0 (the video as it is) to 1 (nothing of it)")
    return strength


def _read_bias(line: TrackLine, written: str) -> float:
    bias = _read_number(written)
    if not 0.0 < bias <= 1.0:
        raise line.error(
            f"has the bias {shorten(written)}: give a weight of past frames above 0 and up to 1 (1 is off)"
        )
    return bias


def _read_number(written: str) -> float:
    try:
        return float(written)
    except ValueError:
        return math.nan


def _parse_exact(line: TrackLine, text: str) -> tuple[tuple[str, float], ...]:
    parts = read_exact(text)
    if parts is None:
        raise line.error(
            "says exact, and no JSON string is behind its colon: write the prompt in double quotes, such as "
            "'4 exact: \"two\\nlines\"', or leave out the word"
        )
    return parts


def _check_values(line: TrackLine) -> TrackLine:
    """The line without a prompt, which can do nothing but begin."""
    is_more = "a transition" if line.is_transition else "a cut" if line.cut else "an end" if line.end else ""
    if is_more:
        raise line.error(
            f"has {is_more} and no prompt: write one behind the colon, or only where the values begin, such as "
            "'9 strength 0.4:'"
        )
    return line


def parse_prompts(line: TrackLine, text: str) -> tuple[tuple[str, float], ...]:
    """The prompts behind a line's colon, with their shares.

    Raises:
        ValueError: there is none, or a weight cannot be.
    """
    if SEPARATOR not in text:
        if not text.strip():
            raise line.error("has no prompt: write what these blocks show behind the colon")
        return ((text.strip(), 1.0),)
    weighted = [_parse_part(line, part.strip()) for part in text.split(SEPARATOR)]
    if not math.isfinite(sum(weight for _, weight in weighted)) or not any(weight for _, weight in weighted):
        raise line.error("has weights that add up to nothing: give at least one above 0")
    return shares_of(weighted)


def _parse_part(line: TrackLine, part: str) -> tuple[str, float]:
    found = _WEIGHT.match(part)
    prompt, written = (part, "1") if found is None else found.groups()
    # A part that begins with a colon is a weight alone.
    if not prompt.strip() or prompt.startswith(":"):
        raise line.error(f"has no prompt beside '{SEPARATOR}': write one on each side")
    weight = _read_number(written)
    if not (math.isfinite(weight) and weight >= 0):
        raise line.error(f"has the weight {shorten(written)}: give a number of 0 or more, such as ':0.7'")
    return prompt.strip(), weight


def shorten(text: str) -> str:
    """A line as messages show it."""
    text = "".join(letter if letter.isprintable() else "?" for letter in " ".join(text[:_MOST_LOOKED_AT].split()))
    return text if len(text) <= _SHOWN_LETTERS else text[: _SHOWN_LETTERS - 3] + "..."
