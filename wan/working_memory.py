"""Bytes of a stream's attention caches, from the transformer's config."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch


def kv_cache_bytes(
    transformer_config: Mapping[str, Any], *, frames: int, tokens_per_frame: int, dtype: torch.dtype
) -> int:
    """Bytes of the self-attention cache: 2 x layers x frames x tokens x dim x element size."""
    return _cache_bytes(transformer_config, frames * tokens_per_frame, dtype)


def cross_cache_bytes(transformer_config: Mapping[str, Any], *, text_tokens: int, dtype: torch.dtype) -> int:
    """Bytes of the cross-attention cache: 2 x layers x text tokens x dim x element size."""
    return _cache_bytes(transformer_config, text_tokens, dtype)


def _cache_bytes(transformer_config: Mapping[str, Any], tokens: int, dtype: torch.dtype) -> int:
    return 2 * transformer_config["num_layers"] * tokens * _inner_dim(transformer_config) * dtype.itemsize


def _inner_dim(transformer_config: Mapping[str, Any]) -> int:
    return transformer_config["num_attention_heads"] * transformer_config["attention_head_dim"]
