"""What stands between the projections of self-attention and its scores, in one pass over memory.

Norm of queries and keys, RoPE, and the copy of keys and values into the cache: written out, eager torch reads and
writes these tensors some ten times, compiled torch two or three times. On CUDA one Triton kernel does it once.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from diffusers.models.transformers.transformer_wan import WanAttention
from torch import nn

from ...ops.triton_kernels import runs_kernel_on
from .attention_passes import SelfAttentionPass
from .kv_cache import write_block
from .rope import RotaryTable, apply_rotary


class Projections(NamedTuple):
    """Queries, keys and values of one layer, each [1, tokens, dim]; rows may lie apart, as in a fused projection."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor


def project_qkv(attn: WanAttention, hidden_states: torch.Tensor) -> Projections:
    """Project [1, tokens, dim], by one layer or by three."""
    if getattr(attn, "fused_projections", False):
        return Projections(*attn.to_qkv(hidden_states).chunk(3, dim=-1))
    return Projections(attn.to_q(hidden_states), attn.to_k(hidden_states), attn.to_v(hidden_states))


def store_block(
    attn: WanAttention, projections: Projections, rotary_emb: RotaryTable, bound: SelfAttentionPass
) -> torch.Tensor:
    """Put keys and values into the cache of the bound pass; returns the rotated queries."""
    if bound.kernel is not None:
        return norm_rotate_and_store(attn, projections, rotary_emb, bound.keys, bound.values, bound.past, bound.kernel)
    query, key = norm_and_rotate(attn, projections, rotary_emb)
    write_block(bound.keys, bound.values, bound.past, key, split_heads(projections.value, attn.heads))
    return query


def norm_and_rotate(
    attn: WanAttention, projections: Projections, rotary_emb: RotaryTable
) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries in the dtype of the projections; keys in float32, which whoever stores them casts on the way."""
    query = apply_rotary(split_heads(attn.norm_q(projections.query), attn.heads), *rotary_emb)
    key = apply_rotary(split_heads(attn.norm_k(projections.key), attn.heads), *rotary_emb)
    return query.type_as(projections.value), key


def norm_rotate_and_store(
    attn: WanAttention,
    projections: Projections,
    rotary_emb: RotaryTable,
    keys: torch.Tensor,
    values: torch.Tensor,
    past: int,
    kernel: Any,  # noqa: ANN401
) -> torch.Tensor:
    """Norm, rotate, and store keys and values behind `past` tokens.

    Args:
        attn: whose norms are applied; `has_plain_norms`.
        projections: of the block's tokens.
        rotary_emb: of `FrameOffsetRotaryEmbedding`, for these tokens.
        keys: the layer's cache [1, capacity tokens, heads, head_dim], contiguous; written.
        values: the same.
        past: tokens in front of the block.
        kernel: of `load_kernel`.

    Returns:
        The rotated queries [1, tokens, heads, head_dim].
    """
    query, key, value = projections
    _, tokens, dim = query.shape
    heads, head_dim = keys.shape[2:]
    rotated = torch.empty((1, tokens, heads, head_dim), dtype=value.dtype, device=value.device)
    kernel[(tokens,)](
        query,
        key,
        value,
        query.stride(1),
        attn.norm_q.weight,
        attn.norm_k.weight,
        rotary_emb[0],
        rotated,
        keys,
        values,
        past,
        DIM=dim,
        HEAD_DIM=head_dim,
        QUERY_EPSILON=float(attn.norm_q.eps),
        KEY_EPSILON=float(attn.norm_k.eps),
        BLOCK=1 << (dim - 1).bit_length(),
        num_warps=8,
    )
    return rotated


def split_heads(hidden_states: torch.Tensor, heads: int) -> torch.Tensor:
    """[batch, tokens, dim] to [batch, tokens, heads, head_dim]."""
    return hidden_states.unflatten(2, (heads, -1))


def has_plain_norms(attn: WanAttention) -> bool:
    """Whether queries and keys are normed as the kernel does it, over all heads."""
    return all(isinstance(norm, nn.RMSNorm) and norm.weight is not None for norm in (attn.norm_q, attn.norm_k))


def load_kernel(device: torch.device) -> Any:  # noqa: ANN401
    """The kernel on `device`; None where torch has to compute it (no CUDA, no Triton)."""
    if not runs_kernel_on(device):
        return None
    # Here, because Triton is not installed on machines without a GPU, and takes a second to import.
    from .rotary_store_kernel import norm_rotate_and_store

    return norm_rotate_and_store
