"""Attention processors that give diffusers' `WanTransformer3DModel` a KV cache.

The transformer's own forward stays diffusers'. What a pass needs beyond its arguments (the cache, the
frames' position in time, the bias on past keys) is a `CausalPass`, bound for one forward: each layer's
processor receives its own buffers, so layers differ only in tensors and share one compiled graph.
Without a bound pass the processors compute the same as diffusers' own.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from diffusers.models.attention_dispatch import AttentionBackendName, dispatch_attention_fn
from diffusers.models.transformers.transformer_wan import WanAttention

from ...ops import library_attention
from ...ops.attention_backends import FLASH3_FP8, LIBRARY_BACKENDS
from ...ops.block_masks import BlockCausalShape, BlockMaskCache
from ...ops.call_graphs import CallGraphs
from ...ops.flash3 import flash3
from ...ops.fp8_linear import QuantizedRows
from ...ops.head_quantization import unround_heads
from ...ops.kernels.few_key_launch import FEW_KEY_ATTENTION, FewKeyVariant
from ...ops.kernels.rotary_store_launch import ROTARY_STORE, ROTARY_STORE_FP8, RotaryVariant
from .attention_passes import CausalPass, CrossAttentionPass, SelfAttentionPass
from .cross_attention_cache import CrossAttentionCache
from .fused_norms import LayerNormKernels
from .head_scaled_kv_cache import HeadScaledKVCache
from .next_window import make_next_window, split_tokens
from .packed_kv_cache import PackedKVCache, PackedPast
from .rope import FrameOffsetRotaryEmbedding, RotaryTable
from .rotary_store import (
    Projections,
    as_one_sequence,
    norm_and_rotate,
    project_qkv,
    split_heads,
    store_block,
)

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

    from .cross_attention import CachedCrossAttnProcessor

logger = logging.getLogger(__name__)


class CausalAttention:
    """The link between a transformer's processors and the current pass; one per transformer.

    Attributes:
        rope: of the transformer.
        backend: of diffusers, of every attention that `library` does not compute.
        library: of `LIBRARY_BACKENDS`, of self-attention without a mask; None where `backend` computes that too.
        layers: the processors of self- and cross-attention, by layer.
        takes_block_masks: whether a block-causal pass is one call with a mask, as flex attention takes it.
        block_masks: those masks.
        load_library: finds what of `library` runs; see `library_attention.load`.
        plain_norms: see `rotary_store.has_plain_norms`.
        graphs: of passes, and of pictures that are encoded for them; None where all kernels are launched one by one.
    """

    def __init__(self, rope: FrameOffsetRotaryEmbedding, backend: str, *, plain_norms: bool) -> None:
        self.rope = rope
        self.plain_norms = plain_norms
        self.use_backend(backend)
        self.layers: list[tuple[CausalSelfAttnProcessor, CachedCrossAttnProcessor]] = []
        self.block_masks = BlockMaskCache()
        self.load_library = library_attention.load
        self.graphs: CallGraphs | None = None

    def use_backend(self, backend: str) -> None:
        """Compute attention with `backend` from now on: of diffusers, or one of `LIBRARY_BACKENDS`."""
        self.library = backend if backend in LIBRARY_BACKENDS else None
        self.backend = AttentionBackendName.NATIVE if self.library else AttentionBackendName(backend)
        self.takes_block_masks = self.backend is AttentionBackendName.FLEX
        self._said: set[str] = set()

    @contextmanager
    def bind(self, causal_pass: CausalPass, tokens: int) -> Iterator[None]:
        """Use `causal_pass` for forwards of `tokens` tokens inside the `with` block; always released after it."""
        try:
            self._hand_out(causal_pass, tokens)
            yield
        finally:
            self._release()

    @contextmanager
    def bind_text(self, cache: CrossAttentionCache) -> Iterator[None]:
        """Inside the `with` block, each layer's call writes the keys and values of its text to the cache."""
        try:
            for (_, cross_attention), keys, values in zip(self.layers, cache.keys, cache.values, strict=True):
                texts = cache.by_text(keys), cache.by_text(values)
                cross_attention.bound = CrossAttentionPass(*texts, writes_text=True)
            yield
        finally:
            self._release()

    def reads_8_bits(self, device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
        """Whether self-attention is computed from 8 bits with a scale per head, which the cache may hold then."""
        if self.library is None:
            return False
        return self.load_library(self.library, device, dtype, head_dim) == FLASH3_FP8

    def _load_library(self, key_bias: torch.Tensor | None, like: torch.Tensor) -> str | None:
        """What computes self-attention instead of `backend`; what it leaves to `backend` is said once."""
        if self.library is None:
            return None
        kind = like.device, like.dtype, like.shape[-1]
        loaded = self.load_library(self.library, *kind)
        if loaded is None:
            self._say_once(library_attention.explain(self.library, *kind))
        elif key_bias is not None:
            self._say_once("it takes no attention bias, so passes with a bias are computed so")
        return loaded

    def _say_once(self, reason: str) -> None:
        if reason not in self._said:
            self._said.add(reason)
            logger.warning("attention_backend %s falls back to %s: %s.", self.library, self.backend.value, reason)

    def _hand_out(self, causal_pass: CausalPass, tokens: int) -> None:
        own, text = causal_pass.kv_cache, causal_pass.cross_cache
        # The dtype of the text's keys: those of the past may be in 8 bits.
        device, dtype = own.keys[0].device, text.keys[0].dtype
        # The text's keys are never those of a file.
        heads, head_dim = text.keys[0].shape[2:]
        few = text.few
        few_kernel = None if few is None else FEW_KEY_ATTENTION.load(device, dtype, FewKeyVariant(head_dim))
        rotary = RotaryVariant(heads * head_dim, head_dim)
        scales = own.scales if isinstance(own, HeadScaledKVCache) else [None] * len(self.layers)
        kernel = ROTARY_STORE if scales[0] is None else ROTARY_STORE_FP8
        rotary_kernel = kernel.load(device, dtype, rotary) if self.plain_norms else None
        norms = LayerNormKernels.of_pass(device, dtype)
        library = self._load_library(causal_pass.key_bias, text.keys[0])
        block_mask = None
        causal_tokens = causal_pass.causal_tokens
        own.check_pass(tokens if causal_pass.next_window is None else causal_tokens or tokens, heads, head_dim)
        # With a window of its own, the second block attends in a call of its own; with a bias, which takes the mask's
        # place, too.
        masked = self.takes_block_masks and causal_pass.next_window is None and causal_pass.key_bias is None
        if masked and causal_tokens is not None and causal_tokens < tokens:
            shape = BlockCausalShape(tokens, own.length, causal_tokens, device)
            block_mask = self.block_masks.block_causal(shape)
        self.rope.frame_offset, self.rope.tables = causal_pass.frame_offset, own.rotary
        self.rope.groups = causal_pass.groups
        buffers = zip(self.layers, own.keys, own.values, text.keys, text.values, strict=True)
        last = len(self.layers) - 1
        for index, ((self_attention, cross_attention), keys, values, text_keys, text_values) in enumerate(buffers):
            self_attention.bound = SelfAttentionPass(
                keys,
                values,
                own.length,
                causal_tokens,
                causal_pass.key_bias,
                block_mask,
                rotary_kernel,
                keys_only=causal_pass.keys_only and index == last,
                next_window=causal_pass.next_window,
                library=library,
                scales=scales[index],
                attends_in_8_bits=scales[index] is not None and library == FLASH3_FP8 and causal_pass.key_bias is None,
            )
            self_attention.norms = norms
            if isinstance(own, PackedKVCache):
                self_attention.packed = own.packed_past(index, causal_pass.kept_tokens)
            if text.texts > 1:
                texts = slice(1 if causal_pass.of_past else None)
                of_frames = text.by_text(text_keys)[texts], text.by_text(text_values)[texts]
                cross_attention.bound = CrossAttentionPass(
                    *of_frames, few, few_kernel, frame_tokens=own.tokens_per_frame
                )
            else:
                cross_attention.bound = CrossAttentionPass(
                    text_keys, text_values, None if few_kernel is None else few, few_kernel
                )

    def _release(self) -> None:
        self.rope.frame_offset, self.rope.groups, self.rope.tables = 0, 1, None
        for self_attention, cross_attention in self.layers:
            self_attention.bound = self_attention.packed = self_attention.norms = None
            cross_attention.bound = None


class CausalSelfAttnProcessor:
    """Self-attention of one layer over the past frames in the cache and the current block."""

    def __init__(self, causal: CausalAttention) -> None:
        self.causal = causal
        self.bound: SelfAttentionPass | None = None
        # Read by the layer, outside its compiled part.
        self.packed: PackedPast | None = None
        self.norms: LayerNormKernels | None = None

    def __call__(
        self,
        attn: WanAttention,
        hidden_states: torch.Tensor | QuantizedRows,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        rotary_emb: RotaryTable | None = None,
    ) -> torch.Tensor | QuantizedRows:
        """Attend; hidden_states [batch, tokens, dim] in and out; returned as they are for a keys-only pass."""
        if rotary_emb is None:
            raise ValueError("rotary_emb is None: causal self-attention needs the rotary tables of its tokens.")
        bound = self.bound
        groups = None
        if bound is not None:
            hidden_states, groups = as_one_sequence(hidden_states)
        projections = project_qkv(attn, hidden_states)
        if bound is None:
            query, key = norm_and_rotate(attn, projections, rotary_emb)
            value = split_heads(projections.value, attn.heads)
            attended = dispatch_attention_fn(query, key.type_as(query), value, backend=self.causal.backend)
        elif bound.next_window is not None:
            attended = self._attend_in_turn(attn, projections, rotary_emb, bound)
        else:
            query = store_block(attn, projections, rotary_emb, bound)
            if bound.keys_only:
                return hidden_states
            attended = self._attend_to_cache(query, bound)
        made = attn.to_out[1](attn.to_out[0](attended.flatten(2, 3).to(hidden_states.dtype)))
        return made if groups is None else made.view(groups, -1, made.shape[-1])

    def _attend_in_turn(
        self, attn: WanAttention, projections: Projections, rotary_emb: RotaryTable, bound: SelfAttentionPass
    ) -> torch.Tensor:
        """Two blocks of which the second sees less of the past than the first: its keys do not go into the cache."""
        assert bound.causal_tokens is not None
        (first, first_rotary), (second, second_rotary) = split_tokens(projections, rotary_emb, bound.causal_tokens)
        query = store_block(attn, first, first_rotary, bound)
        parts = [self._attend_to_cache(query, bound._replace(key_bias=None))]
        window = make_next_window(bound, second.key.shape[1])
        query = store_block(attn, second, second_rotary, window)
        parts.append(self._attend_to_cache(query, window))
        return torch.cat(parts, dim=1)

    def _attend_to_cache(self, query: torch.Tensor, bound: SelfAttentionPass) -> torch.Tensor:
        end = bound.past + query.shape[1]
        keys, values = bound.keys[:, :end], bound.values[:, :end]
        key_bias = None if bound.key_bias is None else bound.key_bias[..., :end]
        if bound.causal_tokens is None or bound.causal_tokens >= query.shape[1]:
            return self._attend(query, keys, values, key_bias, bound)
        if bound.block_mask is not None:
            return self._attend(query, keys, values, bound.block_mask, bound)
        # One unmasked attention per block of queries replaces a block-causal mask: exact, without a tokens x tokens
        # mask, and available to backends that take no mask.
        parts = []
        for start in range(0, query.shape[1], bound.causal_tokens):
            stop = min(start + bound.causal_tokens, query.shape[1])
            visible = bound.past + stop
            # The bias is on the keys of the past of the block being denoised, which comes last.
            mask = key_bias if visible == end else None
            part = query[:, start:stop], keys[:, :visible], values[:, :visible]
            parts.append(self._attend(*part, mask, bound))
        return torch.cat(parts, dim=1)

    def _attend(
        self,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        mask: torch.Tensor | BlockMask | None,
        bound: SelfAttentionPass,
    ) -> torch.Tensor:
        if bound.scales is not None:
            if bound.attends_in_8_bits:
                return flash3(query, keys, values, *bound.scales)
            keys = unround_heads(keys, bound.scales.key, query.dtype)
            values = unround_heads(values, bound.scales.value, query.dtype)
        if bound.library is not None and mask is None:
            return library_attention.attend(bound.library, query, keys, values)
        attended: torch.Tensor = dispatch_attention_fn(query, keys, values, attn_mask=mask, backend=self.causal.backend)
        return attended
