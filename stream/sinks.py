"""Where pictures go: an mp4 that is playable while it grows, and the pictures kept in memory."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Protocol

import av
import torch

from .block_encoder import BlockEncoder
from .file_removal import remove_file
from .full_disk import explaining_full_disk
from .growing_mp4 import GrowingMp4, check_fragments, cut_fragments
from .joined_mp4 import check_alike, copy_pictures
from .keep_frames import KeepFrames
from .opened_video import UnreadableVideoError, open_video, video_track
from .picture_rate import exact_rate
from .remux import remux_mp4
from .run_point import VideoMark

logger = logging.getLogger(__name__)

# Constant-quality H.264, which all common players support; 17 is close to visually lossless.
DEFAULT_CRF = 17


class FrameSink(Protocol):
    """Takes the pictures of a stream, block by block."""

    def write(self, frames: torch.Tensor) -> None:
        """Take the next pictures, uint8 [F, height, width, 3] on the CPU; raises ValueError after `close`."""

    def close(self) -> str | None:
        """Finish; calling it again does nothing.

        Returns:
            A sentence for the user when the pictures are safe but not in the intended form; None otherwise.
        """


class Mp4Sink:
    """Encodes H.264 into an mp4 that plays up to the last block at any moment; `close` rewrites it as a plain mp4.

    Args:
        path: of the file.
        fps: pictures a second.
        crf: constant quality of the encoder.
        begin_with: a finished video of such a sink, whose pictures come first, copied as they are encoded; None for
            no other.
        finish_at: where the plain mp4 goes, while the growing one stays as it is; None puts it in its place.
        resume: the growing mp4 at `path` goes on behind this mark; None begins a new one.

    Attributes:
        path: the file; it exists from the first block on. With `finish_at`, that one once it is written.
        frames_written: pictures in the file.
        fps: pictures a second.
    """

    def __init__(
        self,
        path: Path,
        *,
        fps: float | Fraction = 16.0,
        crf: int = DEFAULT_CRF,
        begin_with: Path | None = None,
        finish_at: Path | None = None,
        resume: VideoMark | None = None,
    ) -> None:
        self.path = path
        self._begin_with = begin_with
        self._finish_at = finish_at
        self._resume = resume
        self.frames_written = 0 if resume is None else resume.pictures
        self._fps = exact_rate(fps)
        self.fps = float(fps)
        self._crf = crf
        self._encoder: BlockEncoder | None = None
        self._file: GrowingMp4 | None = None
        self._closed = False

    def write(self, frames: torch.Tensor) -> None:
        """Append one block of pictures, uint8 [F, height, width, 3]; they are in the file when this returns.

        H.264 with chroma at half the size has even widths and heights: of others, the last column or row is left out.

        Raises:
            ValueError: the sink is closed, and its file is finished and stays as it is; or the pictures have another
                size than those before, or none that H.264 can have.
            OSError: the disk is full or the folder cannot be written, and the blocks before are in the file; or the
                file was deleted or changed.
        """
        if self._closed:
            raise ValueError(f"{self.path} is finished: make a new sink, with a path of its own, for more pictures.")
        frames = self._with_even_sides(frames)
        if self._encoder is None or self._file is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._encoder = BlockEncoder(frames.shape[2], frames.shape[1], self._fps, self._crf)
            self._file = self._open(self._encoder)
        with explaining_full_disk(
            self.path.parent, lambda: f"the {self.frames_written} pictures written so far are kept"
        ):
            self._file.append(self._encoder.encode(frames), self._encoder.stream)
        self.frames_written += len(frames)

    def mark(self) -> VideoMark:
        """How far the file is; raises ValueError where there is none yet, or it is finished."""
        if self._file is None:
            raise ValueError(f"{self.path} is not growing.")
        return VideoMark(self._file.blocks, self._file.bytes, self.frames_written)

    def sync(self) -> None:
        """Have what was written outlast a power failure; raises OSError for a file that was deleted or changed."""
        if self._file is not None:
            self._file.check()
            self._file.sync()

    def _open(self, encoder: BlockEncoder) -> GrowingMp4:
        if self._resume is None:
            file = GrowingMp4(self.path)
            self._copy_earlier(encoder, file)
            return file
        mark = self._resume
        check_fragments(self.path, mark.fragments, mark.bytes)
        try:
            with open_video(self.path) as reader:
                check_alike(self.path, video_track(reader), encoder.stream)
        except (av.FFmpegError, UnreadableVideoError) as error:
            raise OSError(
                f"{self.path}, the video of the stream so far, cannot be read as a video ({error}): go on from the "
                "saved stream by Load Saved Stream, or start a new stream."
            ) from error
        encoder.pictures = mark.pictures
        return GrowingMp4.reopen(self.path, mark.fragments, mark.bytes)

    def _with_even_sides(self, frames: torch.Tensor) -> torch.Tensor:
        height, width = (side - side % 2 for side in frames.shape[1:3])
        stream = None if self._encoder is None else self._encoder.stream
        if not height or not width:
            raise ValueError(
                f"the pictures are {frames.shape[2]}x{frames.shape[1]}: an mp4 has at least 2x2; choose a larger size."
            )
        if stream is not None and (stream.width, stream.height) != (width, height):
            raise ValueError(
                f"the pictures are {width}x{height} and those before were {stream.width}x{stream.height}: all pictures "
                "of a stream must have one size."
            )
        return frames[:, :height, :width].contiguous()

    def _copy_earlier(self, encoder: BlockEncoder, file: GrowingMp4) -> None:
        if self._begin_with is None:
            return
        with explaining_full_disk(self.path.parent, lambda: f"the earlier pictures are still in {self._begin_with}"):
            self.frames_written = encoder.pictures = copy_pictures(self._begin_with, file, encoder.stream)

    def close(self) -> str | None:
        """Rewrite the file as a plain mp4 (index in front), which all players can seek in.

        If that fails (a full disk, a player that holds the file open on Windows), the growing file stays; it holds
        every picture.

        Returns:
            A sentence that says so, or None when the file is a plain mp4 or there is none.

        Raises:
            OSError: the file was deleted or changed.
        """
        self._closed = True
        encoder, self._encoder = self._encoder, None
        file, self._file = self._file, None
        if encoder is not None and self.frames_written == 0:
            encoder.close()
            remove_file(self.path)
            return None
        if file is not None:
            file.check()
        elif self._resume is not None:
            # No block followed: what lies behind the mark is dropped all the same.
            cut_fragments(self.path, self._resume.fragments, self._resume.bytes)
            self._resume = None
        else:
            return None
        return self._finish(encoder)

    def _finish(self, encoder: BlockEncoder | None) -> str | None:
        place = self._finish_at or self.path
        plain = place.with_suffix(".plain.mp4")
        try:
            if encoder is not None:
                encoder.close()
            remux_mp4(self.path, plain)
            plain.replace(place)
            self.path = place
        except Exception as error:
            # Catches every error: the pictures are in the file, and the stream must not fail for want of an index.
            logger.warning("rewriting %s failed", self.path, exc_info=True)
            return (
                f"{self.path} holds all {self.frames_written} pictures but stays a fragmented mp4, which some players "
                f"cannot seek in, because rewriting it failed ({error}): close programs that have it open and free "
                "some space, then save the video."
            )
        finally:
            remove_file(plain)
        return None


class FrameKeeper:
    """Keeps the pictures that the user chose, as uint8; memory is flat except with `ALL`."""

    def __init__(self, keep: KeepFrames) -> None:
        self.keep = keep
        self._frames: list[torch.Tensor] = []
        self._closed = False

    def write(self, frames: torch.Tensor) -> None:
        """Take pictures, uint8 [F, height, width, 3]; raises ValueError after `close`."""
        if self._closed:
            raise ValueError("the stream's pictures are complete: make a new keeper for more.")
        if self.keep is KeepFrames.NONE:
            return
        if self.keep is KeepFrames.LAST_BLOCK:
            self._frames.clear()
        self._frames.append(frames)

    def close(self) -> None:
        """Accept no more pictures; the kept ones stay."""
        self._closed = True

    def drop(self) -> None:
        """Drop all pictures of a failed stream: a kept error would keep them alive."""
        self._frames.clear()

    def held(self) -> dict[str, list[torch.Tensor]]:
        """The kept pictures, for the memory timeline."""
        return {"kept": self._frames}

    def frames(self) -> torch.Tensor | None:
        """The kept pictures, uint8 [F, height, width, 3]; None when there are none."""
        return torch.cat(self._frames) if self._frames else None


def close_sinks(sinks: Sequence[FrameSink], *, quietly: bool) -> list[str]:
    """Close every sink, even if one fails, and return their sentences for the user.

    The first failure is raised after all are closed, unless another error is propagating; other failures are
    logged.

    Args:
        sinks: to close.
        quietly: whether another error is propagating.
    """
    said: list[str] = []
    failure: BaseException | None = None
    for sink in sinks:
        try:
            notice = sink.close()
        except BaseException as error:
            if quietly or failure is not None:
                logger.warning("closing %s failed too", type(sink).__name__, exc_info=True)
            failure = failure or error
        else:
            said += [notice] if notice else []
    if quietly:
        for notice in said:
            logger.warning("%s", notice)
    elif failure is not None:
        raise failure
    return said
