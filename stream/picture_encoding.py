"""A block's pictures as small JPEGs, for pages that watch the stream."""

from __future__ import annotations

import io
from dataclasses import dataclass
from threading import Lock

import torch
from PIL import Image

LONGEST_SIDE = 512
MOST_PICTURES = 16
QUALITY = 80


@dataclass(frozen=True)
class EncodedPictures:
    """JPEGs of one block.

    Attributes:
        width: of each in pixels.
        height: of each in pixels.
        jpegs: oldest first.
    """

    width: int
    height: int
    jpegs: tuple[bytes, ...]


class BlockPictures:
    """The pictures of one block, encoded once when first asked for.

    Args:
        block: counted from 0.
        frames: uint8 [F, height, width, 3] on the CPU, F at least 1; held by reference, not to be written to.
    """

    def __init__(self, block: int, frames: torch.Tensor) -> None:
        self.block = block
        self.count = len(frames)
        self._frames: torch.Tensor | None = frames
        self._encoded: EncodedPictures | None = None
        self._lock = Lock()

    def encoded(self) -> EncodedPictures:
        """The JPEGs; takes tens of milliseconds at the first call, and no time later. Thread-safe."""
        with self._lock:
            if self._encoded is None:
                assert self._frames is not None
                self._encoded = encode_pictures(self._frames)
                self._frames = None
            return self._encoded


def encode_pictures(frames: torch.Tensor) -> EncodedPictures:
    """At most `MOST_PICTURES` of uint8 [F, height, width, 3], evenly chosen, at most `LONGEST_SIDE` pixels long."""
    count = min(len(frames), MOST_PICTURES)
    chosen = [round(index * (len(frames) - 1) / max(count - 1, 1)) for index in range(count)]
    images = [_smaller(Image.fromarray(frames[index].numpy())) for index in chosen]
    return EncodedPictures(images[0].width, images[0].height, tuple(map(_jpeg, images)))


def _smaller(image: Image.Image) -> Image.Image:
    image.thumbnail((LONGEST_SIDE, LONGEST_SIDE), Image.Resampling.BILINEAR)
    return image


def _jpeg(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=QUALITY)
    return file.getvalue()
