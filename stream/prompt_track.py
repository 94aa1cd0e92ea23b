"""Prompts over time: a track of lines, as a user wrote them. No torch: nodes read it."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ..checkpoints.checkpoint_error import shown
from .block_clock import BlockClock
from .block_prompt import INTERPOLATIONS, LINEAR
from .placed_track import PlacedTrack
from .track_lines import SEPARATOR, Moment, TrackLine, parse_line, parse_prompts, shorten
from .track_placing import place_lines

# A prompt of two hundred letters on each line; as it is read, a letter takes up to 25 bytes.
MOST_LINES, MOST_LETTERS, MOST_MIXED = 10_000, 2_400_000, 20_000
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
            raise ValueError(
                f"interpolation is {shown(self.interpolation)}: choose one of {', '.join(INTERPOLATIONS)}."
            )
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
        return next((line.cut for line in self.lines if line.has_prompt), False)

    @property
    def has_prompts(self) -> bool:
        """Whether it says what blocks show; else it changes values only, and the prompt comes from elsewhere."""
        return any(line.has_prompt for line in self.lines)

    def check(self, blocks: int | None) -> None:
        """Raise what `place` would, as far as that is known without a clock; nothing for a track in seconds."""
        if not self._is_in_seconds:
            self.place(blocks, None)

    @classmethod
    def parse(cls, text: str, interpolation: str = LINEAR) -> PromptTrack:
        """Read a track; empty lines and lines that begin with `#` say nothing.

        Raises:
            ValueError: one sentence that names the line and what to write.
        """
        check_size("the track", text)
        numbered = ((number, line.strip()) for number, line in enumerate(text.splitlines(), 1))
        said = [(number, line) for number, line in numbered if line and not line.startswith(_COMMENT)]
        if not said:
            raise ValueError("the track has no line: write one such as '0: a calm sea'.")
        if len(said) > MOST_LINES:
            raise ValueError(f"the track has {len(said)} lines: write at most {MOST_LINES}.")
        return cls(tuple(parse_line(number, line) for number, line in said), interpolation)

    @classmethod
    def one_prompt(cls, prompt: str, interpolation: str = LINEAR) -> PromptTrack:
        """The track that shows the same prompt in every block, taken as it is."""
        check_size("prompt", prompt)
        line = TrackLine(1, shorten(f"0: {prompt}"), ((prompt, 1.0),), begin=Moment(0.0))
        return cls((line,), interpolation)

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
        check_size("prompt", prompt)
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
            ValueError: lines overlap without `now`, go backwards, leave blocks without a prompt or name a block past
                the end; a transition has nothing to come from, or is shorter than two blocks.
        """
        if not self.lines:
            raise ValueError("the track has no line: write one such as '0: a calm sea'.")
        if clock is None and self._is_in_seconds:
            raise ValueError(
                "the track has times in seconds, and no stream says how long its blocks are: write blocks."
            )
        lines, values = place_lines(self.lines, blocks, clock)
        return PlacedTrack(lines, self.interpolation, values)

    @property
    def _is_in_seconds(self) -> bool:
        moments = (moment for line in self.lines for moment in (line.begin, line.end) if moment is not None)
        return any(moment.in_seconds for moment in moments)


def check_size(what: str, text: str) -> None:
    """Raise ValueError, one sentence, for a text that is longer than anybody writes, before it is read."""
    if len(text) > MOST_LETTERS:
        raise ValueError(f"{what} has {len(text)} letters: write up to {MOST_LETTERS}.")
    if text.count(SEPARATOR) > MOST_MIXED:
        raise ValueError(f"{what} has {text.count(SEPARATOR)} times '{SEPARATOR}': mix up to {MOST_MIXED} prompts.")
