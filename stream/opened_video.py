"""Open a video that somebody else made: its index is looked at first, and FFmpeg is told what it may be."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import av
from av.container import InputContainer

from .mp4_boxes import Mp4BoxesError, check_boxes

# More than 8K, 7680x4320. FFmpeg makes room for several pictures of the size that a file says.
_MOST_PIXELS = 40_000_000
# Of FFmpeg's demuxers those of videos: others read texts to their end, or open what a playlist names, here or on a
# network.
_FORMATS = (
    "mov,matroska,webm,avi,mpegts,mpeg,flv,ogg,asf,gif,apng,mxf,nut,ivf,h264,hevc,av1,obu,m4v,dv,rm,wtv,webp_pipe"
)


class UnreadableVideoError(ValueError):
    """A file holds no video that can be read; a part of a sentence."""

    # See CheckpointError.
    __module__ = "builtins"


# What reading a file raises that is damaged, or made to be.
UNREADABLE = (av.FFmpegError, UnreadableVideoError, OSError, UnicodeDecodeError)


@contextmanager
def open_video(source: Path | io.BytesIO) -> Iterator[InputContainer]:
    """A video file, or the content of one, open at its start.

    Raises:
        UnreadableVideoError: its index says more than it holds.
        av.FFmpegError: FFmpeg cannot read it.
        OSError: the file cannot be read.
    """
    try:
        if isinstance(source, io.BytesIO):
            check_boxes(source)
        else:
            if not source.is_file():
                # FFmpeg would wait for a pipe. What is absent is said as it says that.
                source.stat()
                raise UnreadableVideoError("it is no file")
            with source.open("rb") as file:
                check_boxes(file)
    except Mp4BoxesError as error:
        raise UnreadableVideoError(str(error)) from error
    place = source if isinstance(source, io.BytesIO) else str(source)
    # Titles may be in any encoding.
    with av.open(place, mode="r", metadata_errors="replace", options={"format_whitelist": _FORMATS}) as container:
        yield container


def video_track(container: InputContainer) -> av.VideoStream:
    """The first video of a file that FFmpeg can decode; raises UnreadableVideoError where there is none."""
    for stream in container.streams.video:
        if stream.codec_context is not None:
            stream.codec_context.options = {**stream.codec_context.options, "max_pixels": str(_MOST_PIXELS)}
            return stream
    raise UnreadableVideoError("it has no pictures in it that FFmpeg can decode")
