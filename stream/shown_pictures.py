"""The pictures that pages are shown of a running stream: of the newest block, in parts while it is decoded."""

from __future__ import annotations

import torch

from .picture_encoding import BlockPictures


class ShownPictures:
    """The newest block's pictures, whole, and in parts where it is shown as it is decoded.

    Not for several threads at once.
    """

    def __init__(self) -> None:
        self._whole: BlockPictures | None = None
        self._parts: tuple[BlockPictures, ...] = ()

    def add_part(self, frames: torch.Tensor, *, block: int, first: int, of: int) -> None:
        """Show some pictures of a block that is being decoded.

        Args:
            frames: uint8 [F, height, width, 3] on the CPU.
            block: counted from 0.
            first: the place of the first of them in the block; with 0 the block begins, perhaps again.
            of: how many the block has.
        """
        kept = self._parts if first and self._parts and self._parts[-1].block == block else ()
        self._parts = (*kept, BlockPictures(block, frames, first, of))

    def set_block(self, frames: torch.Tensor, block: int) -> None:
        """Show a whole block in the place of the one before; its parts stay, for pages that have seen some of them."""
        self._whole = BlockPictures(block, frames) if len(frames) else None
        if self._parts and (self._parts[-1].block != block or self._parts[-1].end != len(frames)):
            self._parts = ()

    def drop(self) -> None:
        """Hold nothing any more."""
        self._whole, self._parts = None, ()

    def since(self, block: int, pictures: int | None) -> tuple[BlockPictures, ...]:
        """What a page has not seen of the newest block, in the pictures' order.

        Args:
            block: whose pictures it has, -1 for none.
            pictures: how many of them it has; None for a page that takes whole blocks only.
        """
        if pictures is not None and self._parts:
            seen = pictures if self._parts[0].block == block else 0
            return tuple(part for part in self._parts if part.first >= seen)
        return () if self._whole is None or self._whole.block == block else (self._whole,)
