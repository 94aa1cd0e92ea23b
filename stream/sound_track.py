"""The sound of an input video, carried into the stream's file: as long as the pictures, and as AAC."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Protocol

import av
import numpy as np
import torch
from av.audio.resampler import AudioResampler

from .opened_video import open_video, video_track
from .picture_sources import VideoFile, start_of, time_of
from .remux import open_plain_mp4

logger = logging.getLogger(__name__)

Samples = np.ndarray
# What AAC knows; anything else is resampled.
_RATES = frozenset({8000, 11025, 12000, 16000, 22050, 24000, 32000, 44100, 48000})
_USUAL_RATE = 48_000
_FRAME = 1024


@dataclass(frozen=True)
class SoundFormat:
    """Of samples, float32 [channels, samples] in -1..1.

    Attributes:
        rate: samples a second.
        channels: 1 or 2.
    """

    rate: int
    channels: int

    @classmethod
    def nearest(cls, rate: int, channels: int) -> SoundFormat:
        """The format to write for a sound of these; more channels than two are mixed."""
        return cls(rate if rate in _RATES else _USUAL_RATE, 1 if channels == 1 else 2)

    @property
    def layout(self) -> str:
        """As FFmpeg calls it."""
        return "mono" if self.channels == 1 else "stereo"


class Sound(Protocol):
    """A sound that begins with a video's first picture; can be read more than once."""

    def format(self) -> SoundFormat | None:
        """The format to write; None where there is no sound."""

    def samples(self, kind: SoundFormat) -> Iterator[Samples]:
        """The samples in order, float32 [channels, any number], each made when it is asked for."""


@dataclass(frozen=True)
class FileSound:
    """The first sound track of a video file that can be decoded."""

    video: VideoFile

    def format(self) -> SoundFormat | None:
        """See `Sound`."""
        with self.video.opened() as container:
            track = _track_of(container)
            return None if track is None else SoundFormat.nearest(track.rate, track.channels)

    def samples(self, kind: SoundFormat) -> Iterator[Samples]:
        """See `Sound`; sound from before the first picture is cut, and silence fills what is missing there."""
        with self.video.opened() as container:
            track = _track_of(container)
            if track is None:
                return
            begin = start_of(video_track(container)) + Fraction(self.video.begin)
            resampler = AudioResampler(format="fltp", layout=kind.layout, rate=kind.rate)
            ahead: int | None = None
            for frame in itertools.chain(container.decode(track), (None,)):
                if frame is not None and ahead is None:
                    time = time_of(frame)
                    ahead = 0 if time is None else round((time - begin) * kind.rate)
                    # A damaged file may say years.
                    for begun in range(0, ahead, kind.rate):
                        yield np.zeros((kind.channels, min(kind.rate, ahead - begun)), dtype=np.float32)
                for made in resampler.resample(frame):
                    samples = made.to_ndarray()
                    cut = min(max(0, -(ahead or 0)), samples.shape[1])
                    ahead = (ahead or 0) + cut
                    yield samples[:, cut:]


@dataclass(frozen=True)
class SoundBatch:
    """A sound in memory, as ComfyUI's AUDIO has it.

    Attributes:
        waveform: float [1, channels, samples] in -1..1.
        rate: samples a second.
    """

    waveform: torch.Tensor
    rate: int

    def format(self) -> SoundFormat | None:
        """See `Sound`."""
        return SoundFormat.nearest(self.rate, self.waveform.shape[1]) if self.waveform.numel() else None

    def samples(self, kind: SoundFormat) -> Iterator[Samples]:
        """See `Sound`."""
        channels = self.waveform[0].float().cpu()
        if channels.shape[0] > 2:
            # Which channel is which, a tensor does not say.
            channels = channels.mean(0, keepdim=True).expand(2, -1)
        layout = "mono" if channels.shape[0] == 1 else "stereo"
        frame = av.AudioFrame.from_ndarray(channels.contiguous().numpy(), format="fltp", layout=layout)
        frame.sample_rate = self.rate
        resampler = AudioResampler(format="fltp", layout=kind.layout, rate=kind.rate)
        for part in (frame, None):
            for made in resampler.resample(part):
                yield made.to_ndarray()


@dataclass(frozen=True)
class SoundPlan:
    """When the sound is heard, in seconds of the stream's file.

    Attributes:
        delay: before it begins.
        seconds: of the whole file; sound beyond is cut.
        period: after which it begins again; None plays it once.
    """

    delay: Fraction
    seconds: Fraction
    period: Fraction | None = None


def add_sound(path: Path, sound: Sound, plan: SoundPlan) -> str | None:
    """Write a finished mp4 again, with sound; its pictures are copied.

    The pictures come first: where this fails the file stays as it was.

    Returns:
        A sentence for the user where the sound could not be carried over; None otherwise.
    """
    target = path.with_suffix(".sound.mp4")
    try:
        kind = sound.format()
        if kind is None:
            return None
        _write(path, target, kind, planned_samples(sound, kind, plan))
        target.replace(path)
    except Exception as error:
        # Every error: a finished stream is not lost for want of its sound.
        logger.warning("the sound of the video could not be carried into %s", path, exc_info=True)
        return f"The sound of the video could not be carried over ({error}); the pictures are complete."
    finally:
        target.unlink(missing_ok=True)
    return None


def planned_samples(sound: Sound, kind: SoundFormat, plan: SoundPlan) -> Iterator[Samples]:
    """The samples of the whole file: delayed, repeated and cut as planned."""
    left = round(plan.seconds * kind.rate)
    delay = min(left, round(plan.delay * kind.rate))
    yield np.zeros((kind.channels, delay), dtype=np.float32)
    left -= delay
    while left > 0:
        room = left if plan.period is None else min(left, max(1, round(plan.period * kind.rate)))
        missing = room
        for samples in sound.samples(kind):
            yield samples[:, :missing]
            missing -= min(missing, samples.shape[1])
            if not missing:
                break
        if plan.period is None:
            return
        yield np.zeros((kind.channels, missing), dtype=np.float32)
        left -= room


def _track_of(container: av.container.InputContainer) -> av.AudioStream | None:
    # FFmpeg lists tracks that it cannot decode, too.
    return next((track for track in container.streams.audio if track.codec_context is not None), None)


def _write(source: Path, target: Path, kind: SoundFormat, samples: Iterator[Samples]) -> None:
    with open_video(source) as reader, open_plain_mp4(target) as writer:
        for key, value in reader.metadata.items():
            writer.metadata[key] = value
        pictures = video_track(reader)
        copied = writer.add_stream_from_template(pictures)
        track = writer.add_stream("aac", rate=kind.rate, layout=kind.layout)
        encoded = _encode(track, kind, samples)
        waiting = next(encoded, None)
        for packet in reader.demux(pictures):
            if packet.dts is None:
                continue
            # In turns: the muxer would hold back the pictures of the whole file for the sound that follows them.
            while waiting is not None and _packet_time(waiting) <= _packet_time(packet):
                writer.mux(waiting)
                waiting = next(encoded, None)
            packet.stream = copied
            writer.mux(packet)
        for rest in (waiting, *encoded):
            if rest is not None:
                writer.mux(rest)


def _packet_time(packet: av.Packet) -> Fraction:
    return (packet.dts or 0) * packet.time_base


def _encode(track: av.AudioStream, kind: SoundFormat, samples: Iterator[Samples]) -> Iterator[av.Packet]:
    """Packets of AAC, whose frames have a fixed length."""
    held = np.zeros((kind.channels, 0), dtype=np.float32)
    done = 0
    for new in itertools.chain(samples, (None,)):
        if new is not None:
            held = np.concatenate([held, new], axis=1)
        while held.shape[1] >= _FRAME or (new is None and held.shape[1]):
            frame = av.AudioFrame.from_ndarray(
                np.ascontiguousarray(held[:, :_FRAME]), format="fltp", layout=kind.layout
            )
            frame.sample_rate, frame.pts, frame.time_base = kind.rate, done, Fraction(1, kind.rate)
            done += frame.samples
            held = held[:, _FRAME:]
            yield from track.encode(frame)
    yield from track.encode(None)
