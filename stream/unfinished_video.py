"""Move the video of a stream that ended early to where it stays."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping
from pathlib import Path

from .file_removal import remove_file
from .remux import remux_mp4

logger = logging.getLogger(__name__)


def move_unfinished(source: Path, target: Path, metadata: Mapping[str, str]) -> bool:
    """Move a video to `target`, then write `metadata` into it.

    In this order, so that the video is safe at once, however the process ends, and a full disk costs no more than the
    metadata. Between two filesystems it is copied.

    Args:
        source: any mp4, fragmented or not; gone afterwards.
        target: an empty file that was made for the video, so that no other is overwritten; deleted again when the move
            fails.
        metadata: see `remux_mp4`.

    Returns:
        Whether the metadata could be written. Where not, the log says why.

    Raises:
        OSError: the video could not be moved and is still in `source`.
    """
    try:
        _move(source, target)
    except BaseException:
        target.unlink(missing_ok=True)
        raise
    return not metadata or _embed(target, metadata)


def _move(source: Path, target: Path) -> None:
    try:
        source.replace(target)
    except OSError:
        # Another filesystem, or a program that has the file open on Windows.
        shutil.copyfile(source, target)
        remove_file(source)


def _embed(video: Path, metadata: Mapping[str, str]) -> bool:
    whole = video.with_suffix(".workflow.mp4")
    try:
        remux_mp4(video, whole, metadata)
        whole.replace(video)
    except Exception:
        # Catches every error: the pictures are in their place, and what ended the stream must be seen, not this.
        logger.warning("writing the workflow into %s failed", video, exc_info=True)
        remove_file(whole)
        return False
    return True
