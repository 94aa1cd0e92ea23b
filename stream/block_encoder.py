"""Encodes the pictures of a stream as H.264, each block by itself."""

from __future__ import annotations

import io
from fractions import Fraction

import av
import torch

from .video_colours import Bt709Pictures, tag_bt709


class BlockEncoder:
    """libx264, without buffering pictures; BT.709 of limited range, which the file says.

    Each block has an encoder of its own. One encoder for all of them would choose its quantizers by what it has encoded
    before, so that behind a resume the same pictures would be encoded as others than in a stream that never stopped.
    A new one costs 2 ms at 832x480, and its files are no larger.

    Args:
        width: of the pictures, even.
        height: of the pictures, even.
        fps: pictures a second.
        crf: constant quality.

    Attributes:
        pictures: before the next one, which is the place in time that it gets.
        stream: what the newest packets are of, or the next ones will be.
    """

    def __init__(self, width: int, height: int, fps: Fraction, crf: int) -> None:
        self.pictures = 0
        self._size, self._fps, self._crf = (width, height), fps, crf
        self._pictures = Bt709Pictures()
        self._is_new = False
        self._begin()

    def encode(self, frames: torch.Tensor) -> list[av.Packet]:
        """The packets of a block, in the order of decoding, of uint8 pictures [F, height, width, 3] on the CPU."""
        if not self._is_new:
            self.close()
            self._begin()
        self._is_new = False
        packets = []
        for index, picture in enumerate(frames.numpy()):
            frame = self._pictures.convert(av.VideoFrame.from_ndarray(picture, format="rgb24"))
            frame.pts, frame.time_base = self.pictures, 1 / self._fps
            self.pictures += 1
            if index == 0:
                # Each block starts with a key frame: a cut at any seam needs no re-encoding.
                frame.pict_type = av.video.frame.PictureType.I
            packets += self.stream.encode(frame)
        for packet in packets:
            # Without it, the last picture of a block has no duration until the next block is written.
            packet.duration = int(1 / (self._fps * packet.time_base))
        return packets

    def close(self) -> None:
        """Drop the encoder; no picture is in it."""
        self.stream.encode(None)
        self._container.close()

    def _begin(self) -> None:
        # An encoder needs a container in PyAV; nothing is muxed into this one.
        self._container = av.open(io.BytesIO(), mode="w", format="mp4")
        self.stream = self._container.add_stream("libx264", rate=self._fps)
        self.stream.width, self.stream.height = self._size
        self.stream.pix_fmt = "yuv420p"
        tag_bt709(self.stream)
        # zerolatency: no picture waits for a later one, so all packets of a block are returned with it.
        self.stream.options = {"crf": str(self._crf), "preset": "veryfast", "tune": "zerolatency"}
        # Opens the encoder: a block is muxed by a copy of this stream, which needs its headers.
        self._container.start_encoding()
        self._is_new = True
