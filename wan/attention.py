"""Attention processors that give diffusers' `WanTransformer3DModel` a KV cache.

The transformer's own forward stays diffusers'. What a pass needs beyond its arguments (which cache, where the
frames stand in time, which past keys are biased) is a `CausalPass`, bound for the length of one forward.
Without a bound pass the processors compute what diffusers' own would.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from diffusers import WanTransformer3DModel
from diffusers.models.attention_dispatch import AttentionBackendName, dispatch_attention_fn
from diffusers.models.transformers.transformer_wan import WanAttention

from .kv_cache import CrossAttentionCache, KVCache
from .rope import FrameOffsetRotaryEmbedding, apply_rotary

RotaryAngles = tuple[torch.Tensor, torch.Tensor]


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


class CausalAttention:
    """The link between a transformer's processors and the pass being made; one per transformer."""

    def __init__(self, rope: FrameOffsetRotaryEmbedding, backend: AttentionBackendName) -> None:
        self.rope = rope
        self.backend = backend
        self.current: CausalPass | None = None

    @contextmanager
    def bind(self, causal_pass: CausalPass) -> Iterator[None]:
        """Use `causal_pass` for every forward inside the `with` block; always released behind it."""
        self.current = causal_pass
        self.rope.frame_offset = causal_pass.frame_offset
        try:
            yield
        finally:
            self.current = None
            self.rope.frame_offset = 0


class CausalSelfAttnProcessor:
    """Self-attention of one layer over the past frames in the cache and the current block."""

    def __init__(self, layer: int, causal: CausalAttention) -> None:
        self.layer = layer
        self.causal = causal

    def __call__(
        self,
        attn: WanAttention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        rotary_emb: RotaryAngles | None = None,
    ) -> torch.Tensor:
        """Attend; hidden_states [batch, tokens, dim] in and out."""
        if rotary_emb is None:
            raise ValueError("rotary_emb is None: causal self-attention needs the rotary angles of its tokens.")
        query, key, value = _project_qkv(attn, hidden_states)
        query = apply_rotary(_split_heads(attn.norm_q(query), attn.heads), *rotary_emb)
        key = apply_rotary(_split_heads(attn.norm_k(key), attn.heads), *rotary_emb)
        value = _split_heads(value, attn.heads)
        attended = self._attend(query, key, value)
        return attn.to_out[1](attn.to_out[0](attended.flatten(2, 3).type_as(query)))

    def _attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        current = self.causal.current
        backend = self.causal.backend
        if current is None:
            return dispatch_attention_fn(query, key, value, backend=backend)
        past = current.kv_cache.length
        keys, values = current.kv_cache.write(self.layer, key, value)
        if current.causal_tokens is None or current.causal_tokens >= query.shape[1]:
            return dispatch_attention_fn(query, keys, values, attn_mask=current.key_bias, backend=backend)
        # A block-causal mask, as one unmasked attention per block of queries: exact, without a tokens x tokens
        # mask, and open to backends that take no mask.
        parts = []
        for start in range(0, query.shape[1], current.causal_tokens):
            stop = min(start + current.causal_tokens, query.shape[1])
            visible = past + stop
            parts.append(
                dispatch_attention_fn(query[:, start:stop], keys[:, :visible], values[:, :visible], backend=backend)
            )
        return torch.cat(parts, dim=1)


class CachedCrossAttnProcessor:
    """Cross-attention of one layer to the prompt's cached keys and values."""

    def __init__(self, layer: int, causal: CausalAttention) -> None:
        self.layer = layer
        self.causal = causal

    def __call__(
        self,
        attn: WanAttention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        rotary_emb: RotaryAngles | None = None,
    ) -> torch.Tensor:
        """Attend; hidden_states [batch, tokens, dim] in and out."""
        query = _split_heads(attn.norm_q(attn.to_q(hidden_states)), attn.heads)
        current = self.causal.current
        if current is not None:
            key, value = current.cross_cache.keys[self.layer], current.cross_cache.values[self.layer]
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
    for layer, block in enumerate(transformer.blocks):
        block.attn1.set_processor(CausalSelfAttnProcessor(layer, causal))
        block.attn2.set_processor(CachedCrossAttnProcessor(layer, causal))
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
