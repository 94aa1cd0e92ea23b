"""Copy a video into a new container without re-encoding."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path

import av

from .opened_video import open_video


def open_plain_mp4(target: Path) -> av.container.OutputContainer:
    """A new mp4, overwriting another, that is written with its index in front and any entries of metadata.

    Raises ValueError for a path with NUL: FFmpeg takes it for one that ends there, and would overwrite another file.
    """
    _refuse_nul(target)
    return av.open(str(target), mode="w", format="mp4", options={"movflags": "faststart+use_metadata_tags"})


def remux_mp4(source: Path | io.BytesIO, target: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Copy the video and audio streams of `source` into a plain mp4 with its index in front.

    Args:
        source: any mp4, fragmented or not, or the content of one.
        target: overwritten; deleted again when the copy fails.
        metadata: entries of the container; ComfyUI reads a workflow from "prompt" and "workflow".

    Raises:
        OSError: `source` cannot be read or `target` cannot be written.
        ValueError: `source` is not a video.
    """
    _refuse_nul(target)
    if isinstance(source, io.BytesIO):
        source.seek(0)
    try:
        with (
            open_video(source) as reader,
            open_plain_mp4(target) as writer,
        ):
            for key, value in (metadata or {}).items():
                writer.metadata[key] = value
            # A track that FFmpeg does not know, it cannot copy.
            kept = [one for one in reader.streams if one.type in ("video", "audio") and one.codec_context is not None]
            copies = {stream.index: writer.add_stream_from_template(stream) for stream in kept}
            for packet in reader.demux(kept):
                # The demuxer ends with an empty packet that marks the flush.
                if packet.dts is None:
                    continue
                packet.stream = copies[packet.stream.index]
                writer.mux(packet)
    except BaseException:
        target.unlink(missing_ok=True)
        raise


def _refuse_nul(target: Path) -> None:
    if "\0" in str(target):
        raise ValueError(f"the new file is {str(target)!r}: give a path without NUL characters.")
