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
    """The pictures of one block, or some of them, encoded once when first asked for.

    Args:
        block: counted from 0.
        frames: uint8 [F, height, width, 3] on the CPU, F at least 1; held by reference, not to be written to.
        first: the place of the first of them in the block.
        of: how many pictures the block has; None where these are all.
    """

    def __init__(self, block: int, frames: torch.Tensor, first: int = 0, of: int | None = None) -> None:
        self.block = block
        self.first = first
        self.count = len(frames)
        self.of = first + self.count if of is None else of
        self._frames: torch.Tensor | None = frames
        self._encoded: EncodedPictures | None = None
        self._lock = Lock()

    @property
    def end(self) -> int:
        """How many of the block's pictures a page has seen with these."""
        return self.first + self.count

    def encoded(self) -> EncodedPictures:
        """The JPEGs; takes tens of milliseconds at the first call, and no time later. Thread-safe."""
        with self._lock:
            if self._encoded is None:
                assert self._frames is not None
                # Of a block that is shown in parts as many are chosen as of one that is shown whole.
                most = max(1, MOST_PICTURES * self.count // max(self.of, MOST_PICTURES))
                self._encoded = encode_pictures(self._frames, most)
                self._frames = None
            return self._encoded


def encode_pictures(frames: torch.Tensor, most: int = MOST_PICTURES) -> EncodedPictures:
    """At most `most` of uint8 [F, height, width, 3], evenly chosen, at most `LONGEST_SIDE` pixels long."""
    count = min(len(frames), most)
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
