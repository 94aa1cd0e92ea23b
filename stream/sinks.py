"""Where pictures go: an mp4 that is playable while it grows, and the pictures kept in memory."""

from __future__ import annotations

import errno
import io
from fractions import Fraction
from pathlib import Path
from typing import Protocol

import av
import torch

from .growing_mp4 import GrowingMp4
from .keep_frames import KeepFrames
from .remux import remux_mp4

# Constant-quality H.264 that players everywhere take; 17 is close to visually lossless.
DEFAULT_CRF = 17


class FrameSink(Protocol):
    """Takes the pictures of a stream, block by block."""

    def write(self, frames: torch.Tensor) -> None:
        """Take the next pictures, uint8 [F, height, width, 3] on the CPU."""

    def close(self) -> None:
        """Finish; calling it again does nothing."""


class Mp4Sink:
    """Encodes H.264 into an mp4 that plays up to the last block at any moment; `close` makes it a plain one.

    Attributes:
        path: the file; it exists from the first block on.
        frames_written: pictures in the file.
    """

    def __init__(self, path: Path, *, fps: float = 16.0, crf: int = DEFAULT_CRF) -> None:
        self.path = path
        self.frames_written = 0
        self._fps = Fraction(fps).limit_denominator(1001)
        self._crf = crf
        self._encoder: _Encoder | None = None
        self._file: GrowingMp4 | None = None

    def write(self, frames: torch.Tensor) -> None:
        """Append one block of pictures, uint8 [F, height, width, 3]; they are in the file when this returns.

        Raises:
            OSError: the disk is full or the folder cannot be written; the blocks before are in the file.
        """
        if self._encoder is None or self._file is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._encoder = _Encoder(frames.shape[2], frames.shape[1], self._fps, self._crf)
            self._file = GrowingMp4(self.path, self._encoder.stream)
        try:
            self._file.append(self._encoder.encode(frames))
        except OSError as error:
            raise _explain_disk(error, self.path, self.frames_written) from error
        self.frames_written += len(frames)

    def close(self) -> None:
        """Rewrite the file as a plain mp4 (index in front), which all players can seek in.

        Raises:
            OSError: no room for the rewrite; the growing file stays and is playable.
        """
        encoder, self._encoder, self._file = self._encoder, None, None
        if encoder is None:
            return
        encoder.close()
        if self.frames_written == 0:
            self.path.unlink(missing_ok=True)
            return
        plain = self.path.with_suffix(".plain.mp4")
        try:
            remux_mp4(self.path, plain)
            plain.replace(self.path)
        except OSError as error:
            raise _explain_disk(error, self.path, self.frames_written) from error
        finally:
            plain.unlink(missing_ok=True)


class _Encoder:
    """libx264 that keeps no picture back."""

    def __init__(self, width: int, height: int, fps: Fraction, crf: int) -> None:
        self._fps = fps
        # An encoder needs a container in PyAV; nothing is muxed into this one.
        self._container = av.open(io.BytesIO(), mode="w", format="mp4")
        self.stream = self._container.add_stream("libx264", rate=fps)
        self.stream.width, self.stream.height, self.stream.pix_fmt = width, height, "yuv420p"
        # zerolatency: no picture waits for a later one, so a block's packets are there when the block is.
        self.stream.options = {"crf": str(crf), "preset": "veryfast", "tune": "zerolatency"}
        # Opens the encoder: a block is muxed by a copy of this stream, which needs its headers.
        self._container.start_encoding()

    def encode(self, frames: torch.Tensor) -> list[av.Packet]:
        packets = []
        for index, picture in enumerate(frames.numpy()):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            if index == 0:
                # Each block starts with a key frame: a cut at any seam needs no re-encoding.
                frame.pict_type = av.video.frame.PictureType.I
            packets += self.stream.encode(frame)
        for packet in packets:
            # Without it, the last picture of a block would last no time until the next block comes.
            packet.duration = int(1 / (self._fps * packet.time_base))
        return packets

    def close(self) -> None:
        self.stream.encode(None)
        self._container.close()


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

    def held(self) -> dict[str, list[torch.Tensor]]:
        """What is kept, for the memory timeline."""
        return {"kept": self._frames}

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
