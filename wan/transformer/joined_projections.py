"""One `to_qkv` linear layer in place of `to_q`, `to_k`, `to_v` in every self-attention of a Wan transformer.

diffusers' own `fuse_projections` keeps the three old layers next to the new one and fuses cross-attention
too. Here the old ones are deleted, so memory does not double, and cross-attention keeps its projections:
its keys and values come from the text and are computed once per prompt.
"""

from __future__ import annotations

import re
from typing import cast

import torch
from diffusers.models.transformers.transformer_wan import (
    WanAttention,
    WanTransformer3DModel,
    WanTransformerBlock,
)
from torch import nn

_PARTS = ("to_q", "to_k", "to_v")
_PROJECTION = re.compile(r"(blocks\.\d+\.attn1)\.(to_q|to_k|to_v)\.(weight|bias)")


def fuse_self_attention(transformer: WanTransformer3DModel) -> None:
    """Fuse the projections of every `blocks.N.attn1` in place; fused ones are skipped.

    Works on the meta device (the new parameters are meta ones) and on a loaded model, where one layer's
    projections briefly exist twice. diffusers' attention processors use `to_qkv` by themselves,
    because `fused_projections` is set on the attention. Fusing cannot be undone: `unfuse_projections` would
    leave the attention without projections.
    """
    for attention in _self_attentions(transformer):
        if not getattr(attention, "fused_projections", False):
            _fuse(attention)


def fused_rows(transformer: WanTransformer3DModel) -> dict[str, tuple[str, slice]]:
    """Where each original self-attention parameter lies in the fused ones, before or after fusing.

    Returns `{"blocks.0.attn1.to_k.weight": ("blocks.0.attn1.to_qkv.weight", slice(dim, 2 * dim)), ...}`,
    with rows in the order query, key, value.
    """
    rows: dict[str, tuple[str, slice]] = {}
    for index, attention in enumerate(_self_attentions(transformer)):
        prefix = f"blocks.{index}.attn1"
        for part, span in zip(_PARTS, _spans(attention), strict=True):
            for leaf in _leaves(attention):
                rows[f"{prefix}.{part}.{leaf}"] = (f"{prefix}.to_qkv.{leaf}", span)
    return rows


def joined_name(name: str) -> str:
    """The name of a parameter after fusing: `to_q`, `to_k` and `to_v` of self-attention are `to_qkv`."""
    match = _PROJECTION.fullmatch(name)
    return f"{match[1]}.to_qkv.{match[3]}" if match else name


def _self_attentions(transformer: WanTransformer3DModel) -> list[WanAttention]:
    return [cast(WanTransformerBlock, block).attn1 for block in transformer.blocks]


def _spans(attention: WanAttention) -> tuple[slice, slice, slice]:
    query, key = attention.inner_dim, attention.kv_inner_dim
    return slice(0, query), slice(query, query + key), slice(query + key, query + 2 * key)


def _leaves(attention: WanAttention) -> list[str]:
    layer = attention.to_qkv if hasattr(attention, "to_qkv") else attention.to_q
    return [name for name, _ in layer.named_parameters()]


@torch.no_grad()
def _fuse(attention: WanAttention) -> None:
    """Build `to_qkv` from the three layers and delete them, one parameter at a time."""
    old = [getattr(attention, part) for part in _PARTS]
    fused = nn.Linear(
        old[0].in_features,
        sum(layer.out_features for layer in old),
        bias=old[0].bias is not None,
        device="meta",
        dtype=old[0].weight.dtype,
    )
    for leaf, first in list(old[0].named_parameters()):
        joined = torch.cat([getattr(layer, leaf) for layer in old])
        setattr(fused, leaf, nn.Parameter(joined, requires_grad=first.requires_grad))
        for layer in old:
            delattr(layer, leaf)
    fused.train(attention.training)
    for part in _PARTS:
        delattr(attention, part)
    attention.to_qkv = fused
    attention.fused_projections = True
