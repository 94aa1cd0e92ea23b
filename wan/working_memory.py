"""Bytes that a stream needs beside the weights: caches exactly, activations as an upper estimate."""

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


def activation_bytes(transformer_config: Mapping[str, Any], *, tokens: int, dtype: torch.dtype) -> int:
    """Upper estimate of one pass's activations.

    The widest moment of a layer holds the residual and its normed copies (two of them float32, diffusers
    computes norms so), query, key, value and their rotated copies, or the feed-forward's two hidden states.
    """
    dim = _inner_dim(transformer_config)
    per_token = dim * (2 * 4 + 8 * dtype.itemsize) + 2 * transformer_config["ffn_dim"] * dtype.itemsize
    return tokens * per_token


def decoder_bytes(vae_config: Mapping[str, Any], *, height: int, width: int, dtype: torch.dtype) -> int:
    """Upper estimate of the VAE decoder's cache and activations for one latent frame (4 pictures).

    The cache holds about 25 x base_dim values a pixel (1.76 GiB at 832x480 and base_dim 96 in float16); the
    widest layer works on 4 pictures of 2 x base_dim channels, in three float32 copies.
    """
    per_pixel = vae_config["base_dim"] * (25 * dtype.itemsize + 4 * 2 * 3 * 4)
    return height * width * per_pixel


def _cache_bytes(transformer_config: Mapping[str, Any], tokens: int, dtype: torch.dtype) -> int:
    return 2 * transformer_config["num_layers"] * tokens * _inner_dim(transformer_config) * dtype.itemsize


def _inner_dim(transformer_config: Mapping[str, Any]) -> int:
    return transformer_config["num_attention_heads"] * transformer_config["attention_head_dim"]
