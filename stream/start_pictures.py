"""Pictures that a stream goes on from: one image, or the end of a video."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction

import torch

from .fit_pictures import PictureFit, check_fit_choice
from .picture_choices import CROP
from .picture_rate import exact_rate
from .picture_sources import PictureSource, ShownPicture


@dataclass(frozen=True)
class GivenStart:
    """Pictures of the stream's size.

    Attributes:
        pictures: uint8 [F, height, width, 3], oldest first; the stream goes on after the last.
        shown: of these, those that the video begins with, uint8 [F, height, width, 3]: an image is the first picture
            of its video, while a video that goes on does not show its past again.
        notices: what was done to them.
    """

    pictures: torch.Tensor
    shown: torch.Tensor
    notices: tuple[str, ...]


@dataclass(frozen=True)
class StartPictures:
    """What a stream goes on from.

    Attributes:
        source: of the pictures; of several, the last ones count.
        fps: pictures a second of the stream; a source with a rate of its own is brought to it.
        fit: see `PictureFit`.
    """

    source: PictureSource
    fps: Fraction
    fit: str = CROP

    def __post_init__(self) -> None:
        exact_rate(self.fps)
        check_fit_choice(self.fit)

    def read(self, width: int, height: int, most: int) -> GivenStart:
        """The last pictures, fitted.

        Args:
            width: of the stream, pixels.
            height: of the stream, pixels.
            most: how many pictures of its past a stream can make use of.

        Raises:
            ValueError: the source has no pictures that can be read.
        """
        facts = self.source.facts()
        fit = PictureFit(width, height, self.fit)
        end = self.source.last_pictures(most / self.fps)
        last = _last(end, most) if facts.rate is None else _last_at_rate(end, most, self.fps)
        pictures = torch.stack([fit.apply(picture) for picture in last])
        said = fit.describe("start", facts.height, facts.width)
        if len(pictures) > 1:
            said = f"{said} The stream goes on from the last {len(pictures)} pictures of start.".strip()
        shown = pictures if len(pictures) == 1 else pictures[:0]
        return GivenStart(pictures, shown, (said,) if said else ())


def _last(pictures: Iterator[ShownPicture], most: int) -> list[torch.Tensor]:
    return [shown.picture for shown in deque(pictures, maxlen=most)]


def _last_at_rate(pictures: Iterator[ShownPicture], most: int, fps: Fraction) -> list[torch.Tensor]:
    """The very last picture, and those that are shown a tick, two ticks, ... before it."""
    held: deque[ShownPicture] = deque()
    for shown in pictures:
        held.append(shown)
        while held[0].end <= shown.begin - (most - 1) / fps:
            held.popleft()
    first, last = held[0].begin, held[-1].begin
    ticks = [tick for back in reversed(range(most)) if (tick := last - back / fps) >= first]
    return [next(shown.picture for shown in reversed(held) if shown.begin <= tick) for tick in ticks]
