"""What is connected to the sampler's sockets for pictures, as the stream takes it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .. import host
from ..stream.picture_rate import exact_rate

if TYPE_CHECKING:
    from ..stream.frame_inbox import FrameInbox
    from ..stream.live_video import LiveVideo
    from ..stream.picture_sources import PictureSource
    from ..stream.sound_track import Sound
    from ..stream.start_pictures import StartPictures
    from ..stream.stream_report import StreamReport
    from ..stream.video_input import VideoInput

# Modules that need PyAV are imported inside functions: the pack must not slow ComfyUI's start.


@dataclass(frozen=True)
class LiveFrames:
    """The pictures that pages push.

    Attributes:
        inbox: where they come in.
        node: the execution id of the node whose page gives them; None outside of a prompt.
        look: called several times a second while the first one is waited for; raises to give up.
    """

    inbox: FrameInbox
    node: str | None
    look: Callable[[], None]


@dataclass(frozen=True)
class ConnectedPictures:
    """The pictures of one run of the sampler.

    Attributes:
        start_source: of the start; None where nothing is connected.
        video_source: of the video; None where nothing is connected.
        sound: of the video; None where it has none.
        strength: of video to video, 0..1.
        fit: see `PictureFit`.
        video_end: see `VideoInput.at_end`.
        live: pictures of pages, in place of a video; None where nothing is connected.
    """

    start_source: PictureSource | None
    video_source: PictureSource | None
    sound: Sound | None
    strength: float
    fit: str
    video_end: str
    live: LiveFrames | None = None

    @classmethod
    def read(
        cls,
        start: Any,  # noqa: ANN401
        video: Any,  # noqa: ANN401
        *,
        strength: float,
        fit: str,
        video_end: str,
        live: LiveFrames | None = None,
    ) -> ConnectedPictures:
        """Look at what is connected, an IMAGE or a VIDEO, before anything heavy.

        Raises:
            ValueError: one sentence, where there are no pictures that can be read, or a choice is not possible.
        """
        start_source = None if start is None else source_of("start", start)
        video_source = None if video is None else source_of("video", video)
        sound = None if video_source is None else sound_of(video, video_source)
        given = cls(start_source, video_source, sound, float(strength), fit, video_end, live)
        given.start(1.0)
        given.video(1.0)
        return given

    def start(self, fps: float) -> StartPictures | None:
        """What a stream of that many pictures a second goes on from."""
        from ..stream.start_pictures import StartPictures

        return None if self.start_source is None else StartPictures(self.start_source, exact_rate(fps), self.fit)

    def video(self, fps: float) -> VideoInput | LiveVideo | None:
        """What a stream of that many pictures a second is made from."""
        from ..stream.live_video import LiveVideo
        from ..stream.video_input import VideoInput

        if self.live is not None:
            return LiveVideo(self.live.inbox, exact_rate(fps), self.strength, self.live.look, self.fit)
        if self.video_source is None:
            return None
        return VideoInput(self.video_source, exact_rate(fps), self.strength, self.fit, self.video_end)

    def applied(self) -> dict[str, Any]:
        """What was applied, as JSON values."""
        has_video = self.video_source is not None or self.live is not None
        applied: dict[str, Any] = {"strength": self.strength} if has_video else {}
        if self.video_source is not None:
            applied["video_end"] = self.video_end
        return applied | ({"fit": self.fit} if has_video or self.start_source else {})

    def carry_sound(self, path: Path, report: StreamReport, fps: float, *, goes_on: bool) -> list[str]:
        """Write the video's sound into the finished file; sentences where that failed.

        Args:
            path: of the file.
            report: of the stream that made it.
            fps: pictures a second.
            goes_on: whether the stream continues another.
        """
        from ..stream.sound_track import SoundPlan, add_sound

        use = report.video
        if self.sound is None or use is None:
            return []
        if goes_on:
            return ["video: its sound is not carried into a stream that goes on from another."]
        rate = exact_rate(fps)
        # A start image comes first, in silence.
        plan = SoundPlan(
            delay=(report.pictures - use.pictures) / rate,
            seconds=report.pictures / rate,
            period=use.length / rate if use.length is not None and use.rounds else None,
        )
        notice = add_sound(path, self.sound, plan)
        return [notice] if notice else []


def carry_earlier_sound(path: Path, earlier: Path, pictures: int, fps: float) -> list[str]:
    """Write the sound of an earlier video into the file that begins with it; sentences where that failed.

    Args:
        path: of the file.
        earlier: the video that it begins with; only read.
        pictures: in the file, of both.
        fps: pictures a second.
    """
    from ..stream.picture_sources import VideoFile
    from ..stream.sound_track import FileSound, SoundPlan, add_sound

    plan = SoundPlan(delay=Fraction(0), seconds=pictures / exact_rate(fps))
    notice = add_sound(path, FileSound(VideoFile("go_on_from", str(earlier))), plan)
    return [notice] if notice else []


def source_of(name: str, given: Any) -> PictureSource:  # noqa: ANN401
    """The pictures of an IMAGE or a VIDEO; raises ValueError, in one sentence, where there are none."""
    from ..stream.picture_sources import PictureBatch, VideoFile

    source: PictureSource
    if isinstance(given, torch.Tensor):
        source = PictureBatch(name, given)
    else:
        video = host.look_into_video(given)
        if video.file is None:
            assert video.images is not None
            source = PictureBatch(name, video.images, video.rate)
        else:
            source = VideoFile(name, video.file, video.begin, video.duration)
    source.facts()
    return source


def sound_of(given: Any, source: PictureSource) -> Sound | None:  # noqa: ANN401
    """The sound of a VIDEO whose pictures are `source`; None where it has none."""
    from ..stream.picture_sources import VideoFile
    from ..stream.sound_track import FileSound, SoundBatch

    if isinstance(source, VideoFile):
        return FileSound(source)
    audio = None if isinstance(given, torch.Tensor) else host.look_into_video(given).audio
    return None if audio is None else SoundBatch(audio["waveform"], int(audio["sample_rate"]))
