"""Block masks of flex attention, in a cache of bounded size."""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING, NamedTuple

import torch

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask


class BlockCausalShape(NamedTuple):
    """What a block-causal mask depends on: its key in the cache.

    Attributes:
        queries: tokens that attend.
        past: tokens before them, visible to all of them.
        block: tokens of a block; a token sees its own block and those before it.
        device: of the mask.
    """

    queries: int
    past: int
    block: int
    device: torch.device


class BlockMaskCache:
    """The last `size` masks used; the least recently used one is evicted.

    A mask is small (88,800 bytes at 9,360 tokens) but making it is not: `create_block_mask` briefly allocates the dense
    mask, 177 MB at that size. diffusers (0.42.1) keeps none and makes one in each call.
    """

    def __init__(self, size: int = 4) -> None:
        if size < 1:
            raise ValueError(f"size is {size}: a cache of block masks keeps 1 or more.")
        self.size = size
        self._masks: OrderedDict[BlockCausalShape, BlockMask] = OrderedDict()

    def __len__(self) -> int:
        return len(self._masks)

    def block_causal(self, shape: BlockCausalShape) -> BlockMask:
        """The mask of `shape`, made unless it is cached."""
        if shape in self._masks:
            self._masks.move_to_end(shape)
            return self._masks[shape]
        while len(self._masks) >= self.size:
            self._masks.popitem(last=False)
        self._masks[shape] = make_block_causal_mask(shape)
        return self._masks[shape]

    def masks(self) -> dict[str, BlockMask]:
        """The masks by a name that tells their shape, for the memory timeline."""
        return {f"{key.queries} x {key.past + key.queries} by {key.block}": mask for key, mask in self._masks.items()}


def make_block_causal_mask(shape: BlockCausalShape) -> BlockMask:
    """A mask in which token q of the queries sees the past and all keys up to the end of its own block."""
    # Imported here: few streams use flex attention.
    from torch.nn.attention.flex_attention import create_block_mask

    past, block = shape.past, shape.block

    def sees(batch: torch.Tensor, head: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        return key < past + (query // block + 1) * block

    return create_block_mask(sees, None, None, shape.queries, past + shape.queries, device=str(shape.device))
