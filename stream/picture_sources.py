"""Where pictures from outside come from: a video file, decoded as it is read, or pictures in memory."""

from __future__ import annotations

import hashlib
import io
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Protocol

import av
import torch
from av.container import InputContainer

from .fit_pictures import check_pictures
from .opened_video import UNREADABLE, open_video, video_track
from .picture_rate import FASTEST, exact_rate
from .video_colours import RgbPictures

# Of a file that says nothing about its rate.
_UNKNOWN_RATE = Fraction(25)
# Rows and columns of a picture that tell it from another.
_GRID = 64


@dataclass(frozen=True)
class ShownPicture:
    """A picture and when it is shown.

    Attributes:
        begin: seconds after the source's first picture.
        end: seconds, when the next one is due.
        picture: uint8 [height, width, 3], or as a batch in memory has it.
    """

    begin: Fraction
    end: Fraction
    picture: torch.Tensor


@dataclass(frozen=True)
class SourceFacts:
    """What is known of a source before it is read.

    Attributes:
        height: of its pictures.
        width: of its pictures.
        rate: pictures a second, on average; None for pictures without a time.
    """

    height: int
    width: int
    rate: Fraction | None


class PictureSource(Protocol):
    """Pictures from outside; can be read more than once."""

    def facts(self) -> SourceFacts:
        """Look at the first picture; raises ValueError, in one sentence, where there is none that can be read."""

    def pictures(self) -> Iterator[ShownPicture]:
        """The pictures in order, each made when it is asked for."""

    def last_pictures(self, seconds: Fraction) -> Iterator[ShownPicture]:
        """At least the pictures of the last seconds, or all; the times of those count from any start."""

    def identity(self) -> str:
        """Text that tells one video from another, and is the same in another run of the program."""


@dataclass(frozen=True)
class PictureBatch:
    """Pictures in memory.

    Attributes:
        name: of the input, for messages.
        images: float [F, height, width, channels] in 0..1; 1, 3 or 4 channels.
        rate: pictures a second; None where each is one picture of the stream.
    """

    name: str
    images: torch.Tensor
    rate: Fraction | None = None

    def facts(self) -> SourceFacts:
        """See `PictureSource`."""
        check_pictures(self.name, self.images)
        if self.rate is not None:
            exact_rate(self.rate, f"the pictures a second of {self.name}")
        return SourceFacts(self.images.shape[1], self.images.shape[2], self.rate)

    def pictures(self) -> Iterator[ShownPicture]:
        """See `PictureSource`."""
        step = 1 / (self.rate or Fraction(1))
        for index, picture in enumerate(self.images):
            yield ShownPicture(index * step, (index + 1) * step, picture)

    def last_pictures(self, seconds: Fraction) -> Iterator[ShownPicture]:
        """See `PictureSource`."""
        return self.pictures()

    def identity(self) -> str:
        """See `PictureSource`; by a grid of pixels of each picture, as a film may be many GB."""
        down, right = (max(1, side // _GRID) for side in self.images.shape[1:3])
        digest = hashlib.sha256()
        for picture in self.images:
            digest.update(picture[::down, ::right].float().cpu().contiguous().numpy().tobytes())
        return f"pictures {list(self.images.shape)} {self.rate} {digest.hexdigest()}"


@dataclass(frozen=True)
class VideoFile:
    """A video in a file; FFmpeg converts 10 bits, other colour formats and alpha to RGB of 8 bits (`RgbPictures`).

    Attributes:
        name: of the input, for messages.
        file: a path, or the file's content in memory.
        begin: seconds of the file that are left out at its start.
        duration: seconds that are used from there; 0 for all.
    """

    name: str
    file: str | io.BytesIO
    begin: float = 0.0
    duration: float = 0.0

    def facts(self) -> SourceFacts:
        """See `PictureSource`."""
        with self.opened() as container:
            rate = _rate_of(video_track(container))
            shown = next(self._decode(container), None)
        if shown is None:
            raise ValueError(f"{self.name} {self._label} holds no pictures: give a video with at least one.")
        height, width, _ = shown.picture.shape
        return SourceFacts(height, width, rate)

    def pictures(self) -> Iterator[ShownPicture]:
        """See `PictureSource`."""
        with self.opened() as container:
            yield from self._decode(container)

    def last_pictures(self, seconds: Fraction) -> Iterator[ShownPicture]:
        """See `PictureSource`: from the last key frame before them, where the file says how long it is."""
        with self.opened() as container:
            stream = video_track(container)
            length = Fraction(container.duration or 0, av.time_base)
            target = length - seconds - 1
            if not self.duration and target > max(self.begin, 0) and stream.time_base:
                container.seek(int(target / stream.time_base) + (stream.start_time or 0), stream=stream)
            found = False
            for shown in self._decode(container):
                found = True
                yield shown
        if not found:
            # A file whose index misleads is read as a whole.
            yield from self.pictures()

    def identity(self) -> str:
        """See `PictureSource`; a file that was replaced is another video."""
        if isinstance(self.file, str):
            facts = Path(self.file).stat()
            which = f"{self.file} {facts.st_size} {facts.st_mtime_ns}"
        else:
            which = hashlib.sha256(self.file.getbuffer()).hexdigest()
        return f"video {which} {self.begin} {self.duration}"

    @contextmanager
    def opened(self) -> Iterator[InputContainer]:
        """The file, open at its start; its errors become one sentence.

        Raises:
            ValueError: it cannot be read, or has no video in it.
        """
        if isinstance(self.file, io.BytesIO):
            self.file.seek(0)
        elif "\0" in self.file:
            # FFmpeg takes it for a path that ends there.
            raise ValueError(f"{self.name} is {self.file!r}: give a path without NUL characters.")
        try:
            with open_video(self.file if isinstance(self.file, io.BytesIO) else Path(self.file)) as container:
                if not container.streams.video:
                    raise ValueError(f"{self.name} {self._label} has no pictures in it: give a video.")
                video_track(container)
                yield container
        except UNREADABLE as error:
            raise ValueError(f"{self.name} {self._label} cannot be read as a video ({error}): give another.") from error

    @property
    def _label(self) -> str:
        return repr(Path(self.file).name) if isinstance(self.file, str) else "(in memory)"

    def _decode(self, container: InputContainer) -> Iterator[ShownPicture]:
        """Pictures with the times that the file gives them; each is held back until the next one's time is known."""
        stream = video_track(container)
        stream.thread_type = "AUTO"
        usual, colours = 1 / _rate_of(stream), RgbPictures()
        begin = start_of(stream) + Fraction(self.begin).limit_denominator(90_000)
        end = begin + Fraction(self.duration).limit_denominator(90_000) if self.duration else None
        first: Fraction | None = None
        waiting: tuple[Fraction, torch.Tensor] | None = None
        for frame in container.decode(stream):
            time = time_of(frame)
            if time is None:
                time = begin if waiting is None else waiting[0] + usual
            if time < begin:
                continue
            if end is not None and time >= end:
                break
            first = time if first is None else first
            if waiting is not None:
                # A time that goes backwards is that of a damaged file: such a picture follows the one before.
                time = max(time, waiting[0])
                yield ShownPicture(waiting[0] - first, time - first, waiting[1])
            waiting = time, colours.convert(frame)
        if waiting is not None and first is not None:
            yield ShownPicture(waiting[0] - first, waiting[0] + usual - first, waiting[1])


class Resampled:
    """Pictures at the stream's rate: each is shown from the nearest tick on until the next one comes.

    Args:
        pictures: as a source gives them.
        fps: pictures a second of the stream; None takes each picture once.

    Attributes:
        dropped: pictures that are not shown, because the next one has the same tick.
        repeated: how many times a picture was shown again.
        given: pictures given so far.
    """

    def __init__(self, pictures: Iterator[ShownPicture], fps: Fraction | None) -> None:
        self.dropped = self.repeated = self.given = 0
        self._pictures = pictures
        self._fps = fps

    def __iter__(self) -> Iterator[torch.Tensor]:
        """The pictures, one for each tick."""
        waiting: ShownPicture | None = None
        for shown in self._pictures:
            if waiting is not None:
                yield from self._until(waiting, self._tick(shown.begin))
            waiting = shown
        if waiting is not None:
            # The shortest video is one picture long.
            yield from self._until(waiting, max(self._tick(waiting.end), 1))

    def _tick(self, time: Fraction) -> int:
        if self._fps is None:
            return self.given + 1
        return math.floor(time * self._fps + Fraction(1, 2))

    def _until(self, shown: ShownPicture, tick: int) -> Iterator[torch.Tensor]:
        count = tick - self.given
        self.dropped += count <= 0
        self.repeated += max(0, count - 1)
        for _ in range(count):
            self.given += 1
            yield shown.picture


def _rate_of(stream: av.VideoStream) -> Fraction:
    rate = stream.average_rate or stream.guessed_rate
    # A file without steady times may claim as many pictures a second as its clock has ticks.
    return Fraction(rate) if rate and rate <= FASTEST else _UNKNOWN_RATE


def start_of(stream: av.VideoStream) -> Fraction:
    """The time of a track's first picture, in seconds of the file."""
    return (stream.start_time or 0) * Fraction(stream.time_base or 0)


def time_of(frame: av.VideoFrame | av.AudioFrame) -> Fraction | None:
    """The time of a picture or a piece of sound, in seconds of the file; None where it does not say."""
    return None if frame.pts is None or frame.time_base is None else frame.pts * Fraction(frame.time_base)
