"""Save a finished video under a new name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

import av

from .full_disk import explaining_full_disk
from .remux import remux_mp4

ShownT = TypeVar("ShownT")


def save_video(
    source: Path, new_file: Callable[[int, int], tuple[Path, ShownT]], metadata: Mapping[str, str]
) -> tuple[Path, ShownT]:
    """Copy a video without re-encoding to the path that `new_file` returns, with `metadata` embedded; give both back.

    The source stays: ComfyUI caches the sampler's output, and a later run that changes only the file name
    reads it again. ComfyUI empties its temp folder itself.

    Args:
        source: a video file.
        new_file: from width and height to the target path and a value to return to the caller.
        metadata: see `remux_mp4`.

    Raises:
        FileNotFoundError: the source is gone.
        OSError: the disk is full; the source is untouched.
    """
    if not source.is_file():
        raise FileNotFoundError(
            f"video {source} is gone (ComfyUI empties its temp folder when it starts): run the sampler again."
        )
    with av.open(str(source)) as container:
        stream = container.streams.video[0]
        width, height = stream.width, stream.height
    target, shown = new_file(width, height)
    with explaining_full_disk(target.parent, lambda: f"nothing is lost, the video is still in {source}"):
        remux_mp4(source, target, metadata)
    return target, shown
