"""A growing mp4 that begins with the pictures of a finished one, copied without encoding them again."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import av

from .growing_mp4 import GrowingMp4
from .opened_video import UNREADABLE, UnreadableVideoError, open_video, video_track
from .video_colours import BT709_TAGS, colour_tags

# Packets that are in memory at a time, at least.
_PACKETS = 240


def copy_pictures(source: Path, file: GrowingMp4, encoder: av.VideoStream) -> int:
    """Append the video of `source` to `file`, which is empty, and return the number of its pictures.

    The pictures of both share one description of the video in the file's header, so they must be encoded alike; blocks
    begin with key frames, which need none of the pictures before them.

    Args:
        source: a finished mp4 of our sink; only read.
        file: that the pictures go to.
        encoder: of the pictures that come after.

    Raises:
        OSError: `source` cannot be read or `file` cannot be written.
        ValueError: `source` has pictures of another size, or encoded in another way.
    """
    pictures = 0
    try:
        with open_video(source) as reader:
            video = video_track(reader)
            check_alike(source, video, encoder)
            for packets in _groups(reader, video):
                pictures += len(packets)
                file.append(packets, video)
    except (av.FFmpegError, UnreadableVideoError) as error:
        raise OSError(f"{source} cannot be read as a video ({error}): switch same_video off.") from error
    return pictures


def check_earlier(source: Path, pictures: int) -> None:
    """Look at a video that pictures will be joined to, before they are made.

    Raises:
        OSError: one sentence, unless `source` is still the video of so many pictures that it was.
        ValueError: one sentence, if its colours are those of an earlier version.
    """
    what = f"same_video is on and the video before, {source}, "
    then = "run the sampler before this one again, or switch same_video off."
    try:
        with open_video(source) as reader:
            # A file that stayed in fragments says no number.
            video = video_track(reader)
            found, tags = video.frames or pictures, colour_tags(video)
    except UNREADABLE as error:
        raise OSError(f"{what}cannot be read as a video ({error}): {then}") from error
    if found != pictures:
        raise OSError(f"{what}has {found} pictures and had {pictures}: {then}")
    if tags != BT709_TAGS:
        raise ValueError(f"same_video is on and {_of_earlier_version(source)}")


def _of_earlier_version(source: Path) -> str:
    return (
        f"the video before, {source}, has the colours of an earlier version or another program (not tagged as BT.709), "
        "which one file cannot hold beside this stream's: run the sampler before this one again, or switch same_video "
        "off."
    )


def _groups(reader: av.container.InputContainer, video: av.VideoStream) -> Iterator[list[av.Packet]]:
    """Packets some hundreds at a time, each group beginning with a key frame."""
    group: list[av.Packet] = []
    for packet in reader.demux(video):
        # The demuxer ends with an empty packet that marks the flush.
        if packet.dts is None:
            continue
        if packet.is_keyframe and len(group) >= _PACKETS:
            yield group
            group = []
        group.append(packet)
    if group:
        yield group


def check_alike(source: Path, video: av.VideoStream, encoder: av.VideoStream) -> None:
    """Raise ValueError, one sentence, unless one file can hold the video of `source` and what `encoder` makes."""
    sizes = [f"{stream.width}x{stream.height}" for stream in (video, encoder)]
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"{source} has pictures of {sizes[0]} and the stream makes {sizes[1]}: one file cannot hold both; switch "
            "same_video off."
        )
    if colour_tags(video) != BT709_TAGS:
        raise ValueError(_of_earlier_version(source))
    known, wanted = (_parameter_sets(stream.codec_context.extradata or b"") for stream in (video, encoder))
    if known != wanted:
        raise ValueError(
            f"{source} was encoded with other settings than this stream is, so one file cannot hold both without "
            "encoding again: switch same_video off."
        )


def _parameter_sets(extradata: bytes) -> list[bytes]:
    """The sequence and picture parameter sets of H.264, from either form that headers have.

    ISO/IEC 14496-15, 5.3.3.1 (`avcC`: version 1, counts and lengths), or ITU-T H.264 Annex B (start codes).
    """
    if extradata[:1] != b"\x01":
        units = [unit.rstrip(b"\x00") for unit in extradata.split(b"\x00\x00\x01") if unit.strip(b"\x00")]
        return [unit for unit in units if unit[0] & 31 in (7, 8)]
    sets, position = [], 5
    for mask in (31, 255):
        # A header that is broken off has none.
        count, position = (extradata[position : position + 1] or b"\0")[0] & mask, position + 1
        for _ in range(count):
            end = position + 2 + int.from_bytes(extradata[position : position + 2], "big")
            sets.append(extradata[position + 2 : end])
            position = end
    return sets
