"""Where pictures go: an mp4 that is playable while it grows, and the pictures kept in memory."""

from __future__ import annotations

import errno
from enum import Enum
from fractions import Fraction
from pathlib import Path
from typing import Protocol

import av
import torch

from .remux import remux_mp4

# Constant-quality H.264 that players everywhere take; 17 is close to visually lossless.
DEFAULT_CRF = 17
# A fragment per picture, written through at once, so that the file plays up to the last block at any moment.
_GROWING_MP4 = {"movflags": "frag_every_frame+empty_moov+default_base_moof", "flush_packets": "1"}


class FrameSink(Protocol):
    """Takes the pictures of a stream, block by block."""

    def write(self, frames: torch.Tensor) -> None:
        """Take the next pictures, uint8 [F, height, width, 3] on the CPU."""

    def close(self) -> None:
        """Finish; calling it again does nothing."""


class Mp4Sink:
    """Encodes H.264 into a fragmented mp4; `close` turns it into a plain one without re-encoding.

    Attributes:
        path: the file; it exists from the first block on.
        frames_written: pictures so far.
    """

    def __init__(self, path: Path, *, fps: float = 16.0, crf: int = DEFAULT_CRF) -> None:
        self.path = path
        self.frames_written = 0
        self._fps = Fraction(fps).limit_denominator(1001)
        self._crf = crf
        self._container: av.container.OutputContainer | None = None
        self._stream: av.VideoStream | None = None

    def write(self, frames: torch.Tensor) -> None:
        """Encode pictures, uint8 [F, height, width, 3]; they are in the file when this returns.

        Raises:
            OSError: the disk is full or the folder cannot be written; what is in the file stays playable.
        """
        if self._container is None or self._stream is None:
            self._open(height=frames.shape[1], width=frames.shape[2])
        assert self._container is not None and self._stream is not None
        try:
            for index, picture in enumerate(frames.numpy()):
                frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
                if index == 0:
                    # Each block starts with a key frame: a cut at any seam needs no re-encoding.
                    frame.pict_type = av.video.frame.PictureType.I
                self._container.mux(self._stream.encode(frame))
                self.frames_written += 1
        except OSError as error:
            raise _explain_disk(error, self.path, self.frames_written) from error

    def close(self) -> None:
        """Finish the file and rewrite it as a plain mp4 (index in front), which all players can seek in.

        Raises:
            OSError: no room for the rewrite; the fragmented file stays and is playable.
        """
        if self._container is None or self._stream is None:
            return
        container, stream = self._container, self._stream
        self._container = self._stream = None
        try:
            container.mux(stream.encode(None))
        finally:
            container.close()
        plain = self.path.with_suffix(".plain.mp4")
        try:
            remux_mp4(self.path, plain)
            plain.replace(self.path)
        except OSError as error:
            raise _explain_disk(error, self.path, self.frames_written) from error
        finally:
            plain.unlink(missing_ok=True)

    def _open(self, *, height: int, width: int) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        container = av.open(str(self.path), mode="w", format="mp4", options=_GROWING_MP4)
        stream = container.add_stream("libx264", rate=self._fps)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        # zerolatency: the encoder keeps no picture back, so the last block is never missing from the file.
        stream.options = {"crf": str(self._crf), "preset": "veryfast", "tune": "zerolatency"}
        self._container, self._stream = container, stream


class KeepFrames(str, Enum):
    """Which pictures stay in memory for the IMAGE output."""

    ALL = "all"
    LAST_BLOCK = "last block"
    NONE = "none"


class FrameKeeper:
    """Keeps pictures as uint8, as the user chose; memory is flat for all but `ALL`."""

    def __init__(self, keep: KeepFrames) -> None:
        self.keep = keep
        self._frames: list[torch.Tensor] = []

    def write(self, frames: torch.Tensor) -> None:
        """Take pictures, uint8 [F, height, width, 3]."""
        if self.keep is KeepFrames.NONE:
            return
        if self.keep is KeepFrames.LAST_BLOCK:
            self._frames.clear()
        self._frames.append(frames)

    def close(self) -> None:
        """Nothing to finish."""

    def frames(self) -> torch.Tensor | None:
        """The kept pictures, uint8 [F, height, width, 3]; None when there are none."""
        return torch.cat(self._frames) if self._frames else None


def _explain_disk(error: OSError, path: Path, frames_written: int) -> OSError:
    if error.errno != errno.ENOSPC:
        return error
    return OSError(
        errno.ENOSPC,
        f"the disk of {path.parent} is full: the {frames_written} pictures written so far are kept; free some "
        "space and run again",
        str(path),
    )
