"""What one forward of the causal transformer attends to, as a whole and layer by layer."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from ...ops.few_key_attention import FewKeys
from ...ops.head_quantization import HeadScales
from .cross_attention_cache import CrossAttentionCache
from .kv_cache import KVCache, NextWindow

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask


@dataclass(frozen=True)
class CausalPass:
    """What one forward of the transformer attends to.

    Attributes:
        kv_cache: written at its current block, read up to there.
        cross_cache: the prompt's keys and values.
        frame_offset: RoPE position of the first latent frame given to the forward.
        causal_tokens: block length, in tokens, of the block-causal mask; None lets all tokens of the pass see
            each other (one block).
        key_bias: [1, 1, 1, keys], added to the scores of the last block of queries, for as many keys as it sees; None
            for no bias.
        next_window: of two blocks in one pass, what the second sees of the keys before it; None if that is all of them.
        kept_tokens: of the first tokens of the pass, how many keys are kept for later passes.
        groups: how many inputs that follow one another in time the forward's batch is; their tokens are one sequence to
            attention.
        keys_only: the pass is made for the keys and values it writes: the last layer stops after writing its own, and
            the transformer's output is meaningless.
        of_past: its frames lie before the block: of a text per frame they read the first.
    """

    kv_cache: KVCache
    cross_cache: CrossAttentionCache
    frame_offset: int
    causal_tokens: int | None = None
    key_bias: torch.Tensor | None = None
    next_window: NextWindow | None = None
    kept_tokens: int = 0
    groups: int = 1
    keys_only: bool = False
    of_past: bool = False


class SelfAttentionPass(NamedTuple):
    """One layer's part of a `CausalPass`: all that its self-attention reads, and nothing that would trigger
    recompilation of a compiled layer (an index, the position in time)."""

    keys: torch.Tensor
    values: torch.Tensor
    past: int
    causal_tokens: int | None
    key_bias: torch.Tensor | None
    block_mask: BlockMask | None = None
    # Of `ROTARY_STORE`, or with scales of `ROTARY_STORE_FP8`; None where torch computes the same.
    kernel: Any = None
    # Write keys and values without attention: the last layer of a keys-only pass.
    keys_only: bool = False
    next_window: NextWindow | None = None
    # Of `library_attention.load`; None where diffusers' backend computes all.
    library: str | None = None
    # Of a `HeadScaledKVCache`; None where keys and values are in the model's dtype.
    scales: HeadScales | None = None
    # With scales: whether attention is computed from 8 bits. Else keys and values are widened for it.
    attends_in_8_bits: bool = False


class CrossAttentionPass(NamedTuple):
    """One layer's part of a `CausalPass`: what its cross-attention reads.

    Attributes:
        keys: of the prompt; in a transition [texts, tokens of each, heads, head_dim].
        values: the same.
        few: see `CrossAttentionCache`; None if its kernel is not used and there is one text.
        kernel: of `FEW_KEY_ATTENTION`.
        writes_text: keys and values are written from the text of the call, without attention.
        frame_tokens: of a latent frame, where each has a text of its own; 0 where all have one.
    """

    keys: torch.Tensor
    values: torch.Tensor
    few: FewKeys | None = None
    kernel: Any = None
    writes_text: bool = False
    frame_tokens: int = 0


def make_key_bias(
    bias: float, *, past_tokens: int, capacity: int, tokens_per_frame: int, like: torch.Tensor
) -> torch.Tensor | None:
    """Log-bias on the keys of past frames other than the first (Krea Realtime's remedy for error build-up).

    Args:
        bias: factor on the attention weight of those keys; 1.0 is off.
        past_tokens: keys before the current block.
        capacity: keys of the past and of the block at most. As many as the cache has room for give the bias the same
            shape from block to block, so that a compiled layer needs one graph.
        tokens_per_frame: keys of the first frame, which is not biased.
        like: gives device and dtype.

    Returns:
        [1, 1, 1, capacity], or None where nothing is biased.

    Raises:
        ValueError: bias is not in (0, 1].
    """
    if not 0.0 < bias <= 1.0:
        raise ValueError(f"attention_bias is {bias}: choose a value above 0 and up to 1 (1 is off).")
    if bias == 1.0 or past_tokens <= tokens_per_frame:
        return None
    key_bias = like.new_zeros((1, 1, 1, capacity))
    key_bias[..., tokens_per_frame:past_tokens] = math.log(bias)
    return key_bias
