"""A video that a stream is made from, block after block: never more of it in memory than one block needs."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

import torch

from .fit_pictures import PictureFit, check_fit_choice
from .picture_choices import CROP, HOLD, LOOP, STOP, VIDEO_ENDS
from .picture_rate import exact_rate
from .picture_sources import PictureSource, Resampled


def check_strength(strength: float) -> None:
    """Raise ValueError for a strength outside of 0..1, or one that is no number."""
    if not 0.0 <= strength <= 1.0:
        raise ValueError(
            f"strength is {strength}: choose 0 (the video as it is) to 1 (nothing of it but its length and sound)."
        )


@dataclass(frozen=True)
class VideoInput:
    """What a stream is made from.

    Attributes:
        source: of the pictures.
        fps: pictures a second of the stream.
        strength: how much of the video is replaced, 0..1, where a track does not say.
        fit: see `PictureFit`.
        at_end: what follows the video's last picture: "loop" begins again, "hold" repeats the last picture, "stop" ends
            the stream.
    """

    source: PictureSource
    fps: Fraction
    strength: float
    fit: str = CROP
    at_end: str = LOOP

    def __post_init__(self) -> None:
        check_fit_choice(self.fit)
        if self.at_end not in VIDEO_ENDS:
            raise ValueError(f"video_end is {self.at_end!r}: choose from {', '.join(map(repr, VIDEO_ENDS))}.")
        exact_rate(self.fps)
        check_strength(self.strength)

    def identity(self) -> str:
        """See `PictureSource`."""
        return self.source.identity()

    def open(self, width: int, height: int) -> VideoReader:
        """Its pictures at the stream's size, from the first one; raises ValueError where there are none."""
        return VideoReader(self, PictureFit(width, height, self.fit))


@dataclass(frozen=True)
class VideoUse:
    """What a stream took of its video.

    Attributes:
        pictures: of the stream that come from the video.
        dropped: pictures of the video that were left out, because the stream shows fewer a second.
        repeated: how many times one was shown again, because the stream shows more.
        held: how many times the last one was shown after the end.
        rounds: how often it began again.
        length: of the whole video in pictures of the stream; None where its end was not reached.
    """

    pictures: int
    dropped: int
    repeated: int
    held: int
    rounds: int
    length: int | None


class VideoReader:
    """Reads a video once, in the order of the stream.

    Args:
        video: see `VideoInput`.
        fit: to the stream's size.

    Attributes:
        input: the video, as given.
        ended: whether the last picture has been given and no other will follow.
    """

    def __init__(self, video: VideoInput, fit: PictureFit) -> None:
        self.ended = False
        self.input = video
        self._fit = fit
        self._facts = video.source.facts()
        self._given = self._held = self._rounds = 0
        self._length: int | None = None
        self._damage = ""
        self._earlier: list[Resampled] = []
        self._round = self._begin()
        self._pictures = iter(self._round)
        self._newest: torch.Tensor | None = None
        self._fitted: tuple[torch.Tensor, torch.Tensor] | None = None

    @property
    def has_rate(self) -> bool:
        """Whether its pictures are brought to those a second of the stream."""
        return self._facts.rate is not None

    def skip(self, count: int) -> None:
        """Leave out the next `count` pictures: a stream before this one took them."""
        left = count
        while left > 0 and self._next_picture() is not None and not self.ended:
            left -= 1
            if self._rounds and self._length:
                # Each round is as long: those that lie between need not be read.
                self._rounds += left // self._length
                left %= self._length
        self._held = 0

    def next(self, count: int) -> torch.Tensor | None:
        """The next `count` pictures, uint8 [count, height, width, 3].

        None where the video has ended and "stop" was chosen; a block in which it ends is filled up with its last
        picture.
        """
        taken = [self._fit_once(picture) for _ in range(count) if (picture := self._next_picture()) is not None]
        if not taken:
            return None
        missing = count - len(taken)
        self._held += missing
        self._given += count
        return torch.stack(taken + taken[-1:] * missing)

    def use(self) -> VideoUse:
        """What was taken so far."""
        rounds = [*self._earlier, self._round]
        return VideoUse(
            pictures=self._given,
            dropped=sum(one.dropped for one in rounds),
            repeated=sum(one.repeated for one in rounds),
            held=self._held,
            rounds=self._rounds,
            length=self._length,
        )

    def notices(self) -> list[str]:
        """Sentences on what was done to the video."""
        use, facts, fps = self.use(), self._facts, float(self.input.fps)
        said = [self._fit.describe("video", facts.height, facts.width)]
        if self._damage:
            said.append(f"{self._damage} What comes before was used as the whole video.")
        if use.dropped or use.repeated:
            rate = "" if facts.rate is None else f" {float(facts.rate):.4g}"
            said.append(
                f"video: its{rate} pictures a second became {fps:.4g}: {use.dropped} pictures were dropped, "
                f"{use.repeated} shown again."
            )
        if use.length is not None:
            after = {
                LOOP: f"it began again {_times(use.rounds)}",
                HOLD: f"its last picture was shown again {_times(use.held)}",
                STOP: "the stream stopped there"
                + f", behind its last picture shown again {_times(use.held)}" * bool(use.held),
            }[self.input.at_end]
            if self.input.at_end != LOOP or use.rounds:
                said.append(f"video: it ended after {use.length} pictures ({use.length / fps:.4g} s); {after}.")
        return [notice for notice in said if notice]

    def _begin(self) -> Resampled:
        return Resampled(self.input.source.pictures(), self.input.fps if self.has_rate else None)

    def _next_picture(self) -> torch.Tensor | None:
        """The next picture as the source has it; None where no other follows."""
        picture = self._read_on()
        if picture is None and not self.ended:
            self._length = self._length or self._round.given
            if self.input.at_end == LOOP and self._round.given:
                self._earlier.append(self._round)
                self._round = self._begin()
                self._pictures = iter(self._round)
                self._rounds += 1
                picture = self._read_on()
            self.ended = picture is None
        if picture is not None:
            self._newest = picture
            return picture
        if self.input.at_end == HOLD and self._newest is not None:
            self._held += 1
            return self._newest
        return None

    def _read_on(self) -> torch.Tensor | None:
        """The next picture; a file that is damaged further on ends there, and a running stream goes on."""
        try:
            return next(self._pictures, None)
        except ValueError as error:
            # What comes first may be what a stream before this one took.
            if self._newest is None:
                raise
            self._damage = str(error)
            return None

    def _fit_once(self, picture: torch.Tensor) -> torch.Tensor:
        """Repeated pictures are fitted once."""
        if self._fitted is None or self._fitted[0] is not picture:
            self._fitted = picture, self._fit.apply(picture)
        return self._fitted[1]


def _times(count: int) -> str:
    return f"{count} time{'s' * (count != 1)}"
