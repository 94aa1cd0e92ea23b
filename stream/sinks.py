"""Where pictures go: an mp4 that is playable while it grows, and the pictures kept in memory."""

from __future__ import annotations

import io
import logging
from fractions import Fraction
from pathlib import Path
from typing import Protocol

import av
import torch

from .full_disk import explaining_full_disk
from .growing_mp4 import GrowingMp4
from .keep_frames import KeepFrames
from .remux import remux_mp4

logger = logging.getLogger(__name__)

# Constant-quality H.264 that players everywhere take; 17 is close to visually lossless.
DEFAULT_CRF = 17


class FrameSink(Protocol):
    """Takes the pictures of a stream, block by block."""

    def write(self, frames: torch.Tensor) -> None:
        """Take the next pictures, uint8 [F, height, width, 3] on the CPU; raises ValueError after `close`."""

    def close(self) -> str | None:
        """Finish; calling it again does nothing.

        Returns:
            A sentence for the user when the pictures are safe but not as they were to be; None when all is well.
        """


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
        self._closed = False

    def write(self, frames: torch.Tensor) -> None:
        """Append one block of pictures, uint8 [F, height, width, 3]; they are in the file when this returns.

        Raises:
            ValueError: the sink is closed; its file is finished and stays as it is.
            OSError: the disk is full or the folder cannot be written; the blocks before are in the file.
        """
        if self._closed:
            raise ValueError(f"{self.path} is finished: make a new sink, with a path of its own, for more pictures.")
        if self._encoder is None or self._file is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._encoder = _Encoder(frames.shape[2], frames.shape[1], self._fps, self._crf)
            self._file = GrowingMp4(self.path, self._encoder.stream)
        with explaining_full_disk(
            self.path.parent, lambda: f"the {self.frames_written} pictures written so far are kept"
        ):
            self._file.append(self._encoder.encode(frames))
        self.frames_written += len(frames)

    def close(self) -> str | None:
        """Rewrite the file as a plain mp4 (index in front), which all players can seek in.

        Where that fails (a full disk, a player that holds the file open on Windows) the growing file stays, which
        holds every picture.

        Returns:
            A sentence that says so, or None when the file is a plain mp4 or there is none.
        """
        self._closed = True
        encoder, self._encoder, self._file = self._encoder, None, None
        if encoder is None:
            return None
        if self.frames_written == 0:
            encoder.close()
            _remove(self.path)
            return None
        plain = self.path.with_suffix(".plain.mp4")
        try:
            encoder.close()
            remux_mp4(self.path, plain)
            plain.replace(self.path)
        except Exception as error:
            # Whatever it is: the pictures are in the file, and a stream must not fail for a nicer index.
            logger.warning("rewriting %s failed", self.path, exc_info=True)
            return (
                f"{self.path} holds all {self.frames_written} pictures but stays a fragmented mp4, which some players "
                f"cannot seek in, because rewriting it failed ({error}): close programs that have it open and free "
                "some space, then save the video."
            )
        finally:
            _remove(plain)
        return None


def _remove(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        # Another program has it open; it lies in a folder that is emptied.
        logger.warning("%s could not be removed: %s", path, error)


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
        """Take no more pictures; those kept stay."""
        self._closed = True

    def drop(self) -> None:
        """Let go of all pictures, for a stream that failed: who keeps its error would keep them too."""
        self._frames.clear()

    def held(self) -> dict[str, list[torch.Tensor]]:
        """What is kept, for the memory timeline."""
        return {"kept": self._frames}

    def frames(self) -> torch.Tensor | None:
        """The kept pictures, uint8 [F, height, width, 3]; None when there are none."""
        return torch.cat(self._frames) if self._frames else None
