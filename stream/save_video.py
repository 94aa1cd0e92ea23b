"""Save a finished video under a new name: copied where an mp4 can hold it as it is, else encoded again."""

from __future__ import annotations

import io
import itertools
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from fractions import Fraction
from pathlib import Path
from typing import TypeVar

import torch
from av.container import InputContainer

from .file_removal import remove_file
from .frames import to_uint8_frames
from .full_disk import explaining_full_disk
from .opened_video import UNREADABLE, open_video, video_track
from .picture_rate import exact_rate
from .picture_sources import PictureSource, Resampled
from .remux import remux_mp4
from .sinks import Mp4Sink
from .sound_track import Sound, SoundPlan, add_sound

ShownT = TypeVar("ShownT")
# From width and height of the pictures to the path of a new file, and a value for whoever saves.
NewFile = Callable[[int, int], tuple[Path, ShownT]]

# What browsers play from an mp4, by FFmpeg's names; FFmpeg would copy more into one.
_PICTURES = frozenset({"h264", "hevc", "av1"})
_SOUNDS = frozenset({"aac", "mp3", "ac3", "opus"})
# Pictures of a video without a rate.
_USUAL_RATE = Fraction(16)
# That are encoded at a time.
_TOGETHER = 12


def can_copy(source: Path | io.BytesIO) -> bool:
    """Whether a file is an mp4 (or mov) whose tracks can be copied into an mp4 that is played everywhere.

    Other containers give no decoding times, without which pictures that are stored out of order cannot be copied.

    Raises:
        FileNotFoundError: the source is gone.
        ValueError: it cannot be read as a video.
    """
    try:
        with _opened(source) as container:
            if "mp4" not in container.format.name.split(","):
                return False
            # A track that FFmpeg cannot decode has no codec.
            names = [
                (stream.type, stream.codec_context.name if stream.codec_context else "") for stream in container.streams
            ]
    except UNREADABLE as error:
        if isinstance(error, FileNotFoundError):
            raise
        raise ValueError(f"video {_name(source)} cannot be read as a video ({error}): give another.") from error
    pictures = [name for kind, name in names if kind == "video"]
    sounds = [name for kind, name in names if kind == "audio"]
    # Decoders of AV1 have names of their own.
    plain = {"libdav1d": "av1", "libaom-av1": "av1", "mp3float": "mp3", "libopus": "opus"}
    return (
        len(pictures) == 1
        and plain.get(pictures[0], pictures[0]) in _PICTURES
        and all(plain.get(name, name) in _SOUNDS for name in sounds)
    )


def save_video(
    source: Path | io.BytesIO, new_file: NewFile[ShownT], metadata: Mapping[str, str]
) -> tuple[Path, ShownT]:
    """Copy a video without re-encoding to the path that `new_file` returns, with `metadata` embedded; give both back.

    The source stays: ComfyUI caches the sampler's output, and a later run that changes only the file name
    reads it again. ComfyUI empties its temp folder itself.

    Args:
        source: a video file, or its content in memory, of which `can_copy` is true.
        new_file: gives the target.
        metadata: see `remux_mp4`.

    Raises:
        FileNotFoundError: the source is gone.
        OSError: the disk is full; the source is untouched.
    """
    with _opened(source) as container:
        stream = video_track(container)
        width, height = stream.width, stream.height
    target, shown = new_file(width, height)
    with explaining_full_disk(target.parent, lambda: f"nothing is lost, the video is still in {_name(source)}"):
        remux_mp4(source, target, metadata)
    return target, shown


def encode_video(
    source: PictureSource,
    sound: Sound | None,
    new_file: NewFile[ShownT],
    metadata: Mapping[str, str],
    check: Callable[[], None],
) -> tuple[Path, ShownT, str | None]:
    """Encode a video to the path that `new_file` returns, some pictures at a time, at a steady rate.

    Args:
        source: of its pictures.
        sound: None for none.
        new_file: gives the target.
        metadata: see `remux_mp4`.
        check: called between pictures; raises to stop, and nothing stays.

    Returns:
        The path, the value of `new_file`, and a sentence where the sound could not be carried over.

    Raises:
        ValueError: the pictures cannot be read or have a rate that no file has.
        OSError: the disk is full; nothing stays.
    """
    facts = source.facts()
    rate = exact_rate(facts.rate or _USUAL_RATE, "the pictures a second of video")
    target, shown = new_file(facts.width, facts.height)
    encoded = target.with_suffix(".encoded.mp4")
    try:
        with explaining_full_disk(target.parent, lambda: "nothing was saved"):
            sink = Mp4Sink(encoded, fps=rate)
            try:
                _write(source, sink, rate if facts.rate else None, check)
            finally:
                sink.close()
            plan = SoundPlan(delay=Fraction(0), seconds=sink.frames_written / rate)
            notice = None if sound is None else add_sound(encoded, sound, plan)
            remux_mp4(encoded, target, metadata)
    finally:
        remove_file(encoded)
    return target, shown, notice


def _write(source: PictureSource, sink: Mp4Sink, rate: Fraction | None, check: Callable[[], None]) -> None:
    pictures = iter(Resampled(source.pictures(), rate))
    while together := list(itertools.islice(pictures, _TOGETHER)):
        check()
        sink.write(to_uint8_frames([torch.stack(together)]))


def _opened(source: Path | io.BytesIO) -> AbstractContextManager[InputContainer]:
    if isinstance(source, Path) and not source.is_file():
        raise FileNotFoundError(
            f"video {source} is gone (ComfyUI empties its temp folder when it starts): run the sampler again."
        )
    return open_video(source)


def _name(source: Path | io.BytesIO) -> str:
    return str(source) if isinstance(source, Path) else "(in memory)"
