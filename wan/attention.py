"""Attention processors that give diffusers' `WanTransformer3DModel` a KV cache.

The transformer's own forward stays diffusers'. What a pass needs beyond its arguments (which cache, where the
frames stand in time, which past keys are biased) is a `CausalPass`, bound for the length of one forward: each
layer's processor is handed its own buffers, so that layers differ in tensors only and share one compiled graph.
Without a bound pass the processors compute what diffusers' own would.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from diffusers import WanTransformer3DModel
from diffusers.models.attention_dispatch import AttentionBackendName, dispatch_attention_fn
from diffusers.models.transformers.transformer_wan import WanAttention

from ..ops.block_masks import BlockCausalShape, BlockMaskCache
from .kv_cache import CrossAttentionCache, KVCache, write_block
from .rope import FrameOffsetRotaryEmbedding, RotaryTable, apply_rotary

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
        key_bias: [1, 1, 1, keys], added to the attention scores; None for no bias.
    """

    kv_cache: KVCache
    cross_cache: CrossAttentionCache
    frame_offset: int
    causal_tokens: int | None = None
    key_bias: torch.Tensor | None = None


class SelfAttentionPass(NamedTuple):
    """One layer's part of a `CausalPass`: all that its self-attention reads, and nothing that a compiled layer
    would be compiled again for (an index, the place in time)."""

    keys: torch.Tensor
    values: torch.Tensor
    past: int
    causal_tokens: int | None
    key_bias: torch.Tensor | None
    block_mask: BlockMask | None = None


class CausalAttention:
    """The link between a transformer's processors and the pass being made; one per transformer.

    Attributes:
        rope: the transformer's.
        backend: of every attention.
        layers: the processors of self- and cross-attention, by layer.
        block_masks: of flex attention, which takes a block-causal pass in one call.
    """

    def __init__(self, rope: FrameOffsetRotaryEmbedding, backend: AttentionBackendName) -> None:
        self.rope = rope
        self.backend = backend
        self.layers: list[tuple[CausalSelfAttnProcessor, CachedCrossAttnProcessor]] = []
        self.block_masks = BlockMaskCache()

    @contextmanager
    def bind(self, causal_pass: CausalPass, tokens: int) -> Iterator[None]:
        """Use `causal_pass` for forwards of `tokens` tokens inside the `with` block; always released behind it."""
        try:
            self._hand_out(causal_pass, tokens)
            yield
        finally:
            self._release()

    def _hand_out(self, causal_pass: CausalPass, tokens: int) -> None:
        own, text = causal_pass.kv_cache, causal_pass.cross_cache
        block_mask = None
        causal_tokens = causal_pass.causal_tokens
        if self.backend is AttentionBackendName.FLEX and causal_tokens is not None and causal_tokens < tokens:
            shape = BlockCausalShape(tokens, own.length, causal_tokens, own.keys[0].device)
            block_mask = self.block_masks.block_causal(shape)
        self.rope.frame_offset, self.rope.tables = causal_pass.frame_offset, own.rotary
        buffers = zip(self.layers, own.keys, own.values, text.keys, text.values, strict=True)
        for (self_attention, cross_attention), keys, values, text_keys, text_values in buffers:
            self_attention.bound = SelfAttentionPass(
                keys, values, own.length, causal_tokens, causal_pass.key_bias, block_mask
            )
            cross_attention.bound = (text_keys, text_values)

    def _release(self) -> None:
        self.rope.frame_offset, self.rope.tables = 0, None
        for self_attention, cross_attention in self.layers:
            self_attention.bound = None
            cross_attention.bound = None


class CausalSelfAttnProcessor:
    """Self-attention of one layer over the past frames in the cache and the current block."""

    def __init__(self, causal: CausalAttention) -> None:
        self.causal = causal
        self.bound: SelfAttentionPass | None = None

    def __call__(
        self,
        attn: WanAttention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        rotary_emb: RotaryTable | None = None,
    ) -> torch.Tensor:
        """Attend; hidden_states [batch, tokens, dim] in and out."""
        if rotary_emb is None:
            raise ValueError("rotary_emb is None: causal self-attention needs the rotary tables of its tokens.")
        query, key, value = _project_qkv(attn, hidden_states)
        query = apply_rotary(_split_heads(attn.norm_q(query), attn.heads), *rotary_emb).type_as(value)
        key = apply_rotary(_split_heads(attn.norm_k(key), attn.heads), *rotary_emb)
        attended = self._attend(query, key, _split_heads(value, attn.heads))
        return attn.to_out[1](attn.to_out[0](attended.flatten(2, 3).type_as(query)))

    def _attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        bound = self.bound
        backend = self.causal.backend
        if bound is None:
            return dispatch_attention_fn(query, key.type_as(query), value, backend=backend)
        keys, values = write_block(bound.keys, bound.values, bound.past, key, value)
        if bound.causal_tokens is None or bound.causal_tokens >= query.shape[1]:
            return dispatch_attention_fn(query, keys, values, attn_mask=bound.key_bias, backend=backend)
        if bound.block_mask is not None:
            return dispatch_attention_fn(query, keys, values, attn_mask=bound.block_mask, backend=backend)
        # A block-causal mask, as one unmasked attention per block of queries: exact, without a tokens x tokens
        # mask, and open to backends that take no mask.
        parts = []
        for start in range(0, query.shape[1], bound.causal_tokens):
            stop = min(start + bound.causal_tokens, query.shape[1])
            visible = bound.past + stop
            parts.append(
                dispatch_attention_fn(query[:, start:stop], keys[:, :visible], values[:, :visible], backend=backend)
            )
        return torch.cat(parts, dim=1)


class CachedCrossAttnProcessor:
    """Cross-attention of one layer to the prompt's cached keys and values."""

    def __init__(self, causal: CausalAttention) -> None:
        self.causal = causal
        self.bound: tuple[torch.Tensor, torch.Tensor] | None = None

    def __call__(
        self,
        attn: WanAttention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        rotary_emb: RotaryTable | None = None,
    ) -> torch.Tensor:
        """Attend; hidden_states [batch, tokens, dim] in and out."""
        query = _split_heads(attn.norm_q(attn.to_q(hidden_states)), attn.heads)
        if self.bound is not None:
            key, value = self.bound
        elif encoder_hidden_states is not None:
            key, value = project_text(attn, encoder_hidden_states)
        else:
            raise ValueError("encoder_hidden_states is None: cross-attention needs the text or its cache.")
        attended = dispatch_attention_fn(query, key, value, backend=self.causal.backend)
        return attn.to_out[1](attn.to_out[0](attended.flatten(2, 3).type_as(query)))


def install_causal_attention(transformer: WanTransformer3DModel, backend: str = "native") -> CausalAttention:
    """Give every layer a cached processor and the transformer an offsettable RoPE; the weights stay as they are.

    Args:
        transformer: any size of Wan 2.1 text-to-video.
        backend: name of a diffusers attention backend, such as "native" or "flash".

    Returns:
        The link through which passes are bound; `causal_attention_of` finds it again.
    """
    config = transformer.config
    rope = FrameOffsetRotaryEmbedding(config.attention_head_dim, tuple(config.patch_size))
    causal = CausalAttention(rope, AttentionBackendName(backend))
    transformer.rope = rope
    for block in transformer.blocks:
        processors = (CausalSelfAttnProcessor(causal), CachedCrossAttnProcessor(causal))
        block.attn1.set_processor(processors[0])
        block.attn2.set_processor(processors[1])
        causal.layers.append(processors)
    return causal


def causal_attention_of(transformer: WanTransformer3DModel) -> CausalAttention:
    """Find the link that `install_causal_attention` made.

    Raises:
        ValueError: the transformer has other processors.
    """
    processor = transformer.blocks[0].attn1.processor
    if not isinstance(processor, CausalSelfAttnProcessor):
        raise ValueError(
            f"the transformer's attention processor is {type(processor).__name__}: call "
            "install_causal_attention(transformer) first."
        )
    return processor.causal


def block_masks_of(transformer: object) -> dict[str, BlockMask]:
    """The block masks kept for a transformer, by shape; none for one without our processors, or for None."""
    blocks = getattr(transformer, "blocks", None)
    processor = getattr(getattr(blocks[0] if blocks else None, "attn1", None), "processor", None)
    return processor.causal.block_masks.masks() if isinstance(processor, CausalSelfAttnProcessor) else {}


def project_text(attn: WanAttention, text: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of embedded text.

    Args:
        attn: a cross-attention layer.
        text: [batch, text tokens, dim], behind the transformer's text embedder.

    Returns:
        Key and value, each [batch, text tokens, heads, head_dim].
    """
    key = _split_heads(attn.norm_k(attn.to_k(text)), attn.heads)
    return key, _split_heads(attn.to_v(text), attn.heads)


def make_key_bias(
    bias: float, *, past_tokens: int, block_tokens: int, tokens_per_frame: int, like: torch.Tensor
) -> torch.Tensor | None:
    """Log-bias on the keys of past frames other than the first (Krea Realtime's remedy for error build-up).

    Args:
        bias: factor on the attention weight of those keys; 1.0 is off.
        past_tokens: keys in front of the current block.
        block_tokens: keys of the current block.
        tokens_per_frame: keys of the first frame, which is not biased.
        like: gives device and dtype.

    Returns:
        [1, 1, 1, past_tokens + block_tokens], or None where nothing is biased.

    Raises:
        ValueError: bias is not in (0, 1].
    """
    if not 0.0 < bias <= 1.0:
        raise ValueError(f"attention_bias is {bias}: choose a value above 0 and up to 1 (1 is off).")
    if bias == 1.0 or past_tokens <= tokens_per_frame:
        return None
    key_bias = like.new_zeros((1, 1, 1, past_tokens + block_tokens))
    key_bias[..., tokens_per_frame:past_tokens] = math.log(bias)
    return key_bias


def _project_qkv(attn: WanAttention, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    if getattr(attn, "fused_projections", False):
        query, key, value = attn.to_qkv(hidden_states).chunk(3, dim=-1)
        return query, key, value
    return attn.to_q(hidden_states), attn.to_k(hidden_states), attn.to_v(hidden_states)


def _split_heads(hidden_states: torch.Tensor, heads: int) -> torch.Tensor:
    return hidden_states.unflatten(2, (heads, -1))
