"""A video that has neither a rate nor an end: the newest pictures that pages push."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction

import torch

from .fit_pictures import PictureFit, check_fit_choice
from .frame_inbox import FrameInbox
from .picture_choices import CROP
from .video_input import VideoUse, check_strength


@dataclass(frozen=True)
class LiveVideo:
    """What a stream is made from, in place of a `VideoInput`: it has no sound, and cannot be skipped.

    Attributes:
        inbox: where pages put pictures.
        fps: pictures a second of the stream.
        strength: how much of the pictures is replaced, 0..1, where a track does not say.
        look: called several times a second while the first picture is waited for; raise in it to give up.
        fit: see `PictureFit`.
    """

    inbox: FrameInbox
    fps: Fraction
    strength: float
    look: Callable[[], None]
    fit: str = CROP

    def __post_init__(self) -> None:
        check_fit_choice(self.fit)
        check_strength(self.strength)

    def open(self, width: int, height: int) -> LiveReader:
        """Its pictures at the stream's size."""
        return LiveReader(self, PictureFit(width, height, self.fit))

    def identity(self) -> str:
        """See `PictureSource`: every live video is the same one, so a stream that goes on takes the newest pictures."""
        return "live"


class LiveReader:
    """Gives each block the newest pictures; as `VideoReader`.

    Args:
        video: see `LiveVideo`.
        fit: to the stream's size.

    Attributes:
        input: the video, as given.
        has_rate: never.
    """

    has_rate = False

    def __init__(self, video: LiveVideo, fit: PictureFit) -> None:
        self.input = video
        self._fit = fit
        self._given = 0
        video.inbox.fit_to(fit)

    def skip(self, count: int) -> None:
        """Nothing: what a stream before this one took is past."""

    def next(self, count: int) -> torch.Tensor | None:
        """The newest `count` pictures, uint8 [count, height, width, 3]; never None. Waits for the first one."""
        pictures = self.input.inbox.take(count, self.input.look)
        self._given += count
        return pictures

    def use(self) -> VideoUse:
        """What was taken so far."""
        counts = self.input.inbox.counts
        return VideoUse(
            pictures=self._given, dropped=counts.dropped, repeated=counts.repeated, held=0, rounds=0, length=None
        )

    def notices(self) -> list[str]:
        """Sentences on what was done to the pictures."""
        counts = self.input.inbox.counts
        if not counts.came:
            return []
        said = [self._fit.describe("live", counts.height, counts.width)]
        said.append(
            f"live: {counts.came} pictures came for {self._given} of the video; {counts.dropped} were dropped because "
            f"newer ones came, and pictures were shown again {counts.repeated} times."
        )
        return [notice for notice in said if notice]
