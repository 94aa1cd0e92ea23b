"""The work between the projections of self-attention and its scores, in one pass over memory.

This is the norm of queries and keys, RoPE, and the copy of keys and values into the cache. Eager torch reads and
writes these tensors some ten times, compiled torch two or three times; on CUDA one Triton kernel does it once.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from diffusers.models.transformers.transformer_wan import WanAttention
from torch import nn

from ...ops.fp8_linear import FP8_DTYPE, QuantizedRows
from ...ops.head_quantization import HeadScales, round_heads, scale_with_margin
from ...ops.kernels.rotary_store_launch import RowNorm, launch_rotary_store, launch_rotary_store_fp8
from .attention_passes import SelfAttentionPass
from .kv_cache import write_block
from .rope import RotaryTable, apply_rotary


class Projections(NamedTuple):
    """Queries, keys and values of one layer, each [1, tokens, dim]; rows may be strided, as in a fused projection."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor


def project_qkv(attn: WanAttention, hidden_states: torch.Tensor | QuantizedRows) -> Projections:
    """Project [1, tokens, dim] with one fused layer or three."""
    if getattr(attn, "fused_projections", False):
        return Projections(*attn.to_qkv(hidden_states).chunk(3, dim=-1))
    return Projections(attn.to_q(hidden_states), attn.to_k(hidden_states), attn.to_v(hidden_states))


def store_block(
    attn: WanAttention, projections: Projections, rotary_emb: RotaryTable, bound: SelfAttentionPass
) -> torch.Tensor:
    """Put keys and values into the cache of the bound pass; returns the rotated queries.

    In 8 bits, and so are the queries, where the pass says so (`SelfAttentionPass.scales`).
    """
    if bound.scales is not None:
        return _store_in_8_bits(attn, projections, rotary_emb, bound, bound.scales)
    if bound.kernel is not None:
        return launch_rotary_store(
            bound.kernel, projections, _norms_of(attn), rotary_emb[0], bound.keys, bound.values, bound.past
        )
    query, key = norm_and_rotate(attn, projections, rotary_emb)
    write_block(bound.keys, bound.values, bound.past, key, split_heads(projections.value, attn.heads))
    return query


def _store_in_8_bits(
    attn: WanAttention,
    projections: Projections,
    rotary_emb: RotaryTable,
    bound: SelfAttentionPass,
    scales: HeadScales,
) -> torch.Tensor:
    value = split_heads(projections.value, attn.heads)
    dtype = FP8_DTYPE if bound.attends_in_8_bits else value.dtype
    if not bound.past or bound.kernel is None:
        query, key = _norm_and_rotate_exactly(attn, projections, rotary_emb)
    if not bound.past:
        # A pass that begins at the front of the cache: it holds nothing else in 8 bits.
        for scale, part in zip(scales, (query, key, value), strict=True):
            scale.copy_(scale_with_margin(part))
    if bound.kernel is not None:
        stores = scales, bound.keys, bound.values, bound.past, dtype
        return launch_rotary_store_fp8(bound.kernel, projections, _norms_of(attn), rotary_emb[0], *stores)
    write_block(bound.keys, bound.values, bound.past, round_heads(key, scales.key), round_heads(value, scales.value))
    return round_heads(query, scales.query) if bound.attends_in_8_bits else query.to(dtype)


def _norms_of(attn: WanAttention) -> tuple[RowNorm, RowNorm]:
    return RowNorm(attn.norm_q.weight, float(attn.norm_q.eps)), RowNorm(attn.norm_k.weight, float(attn.norm_k.eps))


def norm_and_rotate(
    attn: WanAttention, projections: Projections, rotary_emb: RotaryTable
) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries in the dtype of the projections; keys in float32, to be cast when stored."""
    query, key = _norm_and_rotate_exactly(attn, projections, rotary_emb)
    return query.type_as(projections.value), key


def _norm_and_rotate_exactly(
    attn: WanAttention, projections: Projections, rotary_emb: RotaryTable
) -> tuple[torch.Tensor, torch.Tensor]:
    query = apply_rotary(split_heads(attn.norm_q(projections.query), attn.heads), *rotary_emb)
    key = apply_rotary(split_heads(attn.norm_k(projections.key), attn.heads), *rotary_emb)
    return query, key


def as_one_sequence(hidden_states: torch.Tensor | QuantizedRows) -> tuple[torch.Tensor | QuantizedRows, int]:
    """Groups [batch, tokens, dim] that follow one another in time as one sequence, [1, batch * tokens, dim]; batch."""
    if isinstance(hidden_states, QuantizedRows):
        rows = hidden_states.quantized
        return hidden_states._replace(quantized=rows.reshape(1, -1, rows.shape[-1])), rows.shape[0]
    return hidden_states.reshape(1, -1, hidden_states.shape[-1]), hidden_states.shape[0]


def split_heads(hidden_states: torch.Tensor, heads: int) -> torch.Tensor:
    """[batch, tokens, dim] to [batch, tokens, heads, head_dim]."""
    return hidden_states.unflatten(2, (heads, -1))


def has_plain_norms(attn: WanAttention) -> bool:
    """Whether queries and keys are normed over all heads, as in the kernel."""
    return all(isinstance(norm, nn.RMSNorm) and norm.weight is not None for norm in (attn.norm_q, attn.norm_k))
