"""The kernels of `rotary_store`: norm and rotate queries and keys, write keys and values to the cache.

One writes them in the cache's float dtype, one in e4m3fn in units of a scale per head.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from .gelu_quantization_launch import FP8_DTYPE, FP8_MAX
from .kernel import MOST_BLOCK_VALUES, Kernel, KernelName, launch, next_power_of_two


class RotaryVariant(NamedTuple):
    """What the kernel is compiled for; `dim` is heads * head_dim."""

    dim: int
    head_dim: int


class RowNorm(NamedTuple):
    """An RMS norm over a row: weight [dim], and its epsilon."""

    weight: torch.Tensor
    epsilon: float


def launch_rotary_store(
    kernel: Any,  # noqa: ANN401
    projections: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    norms: tuple[RowNorm, RowNorm],
    cos_sin: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    past: int,
) -> torch.Tensor:
    """Norm, rotate, and store keys and values after `past` tokens.

    Args:
        kernel: of `ROTARY_STORE.load`.
        projections: queries, keys and values, each [1, tokens, dim] with one row stride.
        norms: of queries and of keys.
        cos_sin: float32, (cos, sin) of each pair of each token, contiguous.
        keys: the layer's cache [1, capacity tokens, heads, head_dim], contiguous; written.
        values: the same.
        past: tokens before the block.

    Returns:
        The rotated queries [1, tokens, heads, head_dim], in the dtype of the projections.
    """
    query, key, value = projections
    query_norm, key_norm = norms
    _, tokens, dim = query.shape
    heads, head_dim = keys.shape[2:]
    rotated = torch.empty((1, tokens, heads, head_dim), dtype=value.dtype, device=value.device)
    launch(
        kernel,
        (tokens,),
        value.device,
        query,
        key,
        value,
        query.stride(1),
        query_norm.weight,
        key_norm.weight,
        cos_sin,
        rotated,
        keys,
        values,
        past,
        DIM=dim,
        HEAD_DIM=head_dim,
        QUERY_EPSILON=query_norm.epsilon,
        KEY_EPSILON=key_norm.epsilon,
        BLOCK=next_power_of_two(dim),
        num_warps=8,
    )
    return rotated


def launch_rotary_store_fp8(
    kernel: Any,  # noqa: ANN401
    projections: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    norms: tuple[RowNorm, RowNorm],
    cos_sin: torch.Tensor,
    scales: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    keys: torch.Tensor,
    values: torch.Tensor,
    past: int,
    query_dtype: torch.dtype,
) -> torch.Tensor:
    """Norm, rotate, and store keys and values in 8 bits after `past` tokens.

    Args:
        kernel: of `ROTARY_STORE_FP8.load`.
        projections: queries, keys and values, each [1, tokens, dim] with one row stride.
        norms: of queries and of keys.
        cos_sin: float32, (cos, sin) of each pair of each token, contiguous.
        scales: of queries, keys and values, float32 [1, heads] each, contiguous.
        keys: the layer's cache, float8_e4m3fn [1, capacity tokens, heads, head_dim], contiguous; written.
        values: the same.
        past: tokens before the block.
        query_dtype: of the queries returned; those of 8 bits are in units of their scale.

    Returns:
        The rotated queries [1, tokens, heads, head_dim].
    """
    query, key, value = projections
    query_norm, key_norm = norms
    _, tokens, dim = query.shape
    heads, head_dim = keys.shape[2:]
    rotated = torch.empty((1, tokens, heads, head_dim), dtype=query_dtype, device=value.device)
    launch(
        kernel,
        (tokens,),
        value.device,
        query,
        key,
        value,
        query.stride(1),
        query_norm.weight,
        key_norm.weight,
        cos_sin,
        *scales,
        rotated,
        keys,
        values,
        past,
        DIM=dim,
        HEAD_DIM=head_dim,
        QUERY_EPSILON=query_norm.epsilon,
        KEY_EPSILON=key_norm.epsilon,
        LARGEST=FP8_MAX,
        QUANTIZES_QUERY=query_dtype == keys.dtype,
        BLOCK=next_power_of_two(dim),
        num_warps=8,
    )
    return rotated


def _try_out(kernel: Any, device: torch.device, dtype: torch.dtype, variant: RotaryVariant) -> None:  # noqa: ANN401
    tokens, past = 1, 3
    row = torch.zeros((1, tokens, variant.dim), device=device, dtype=dtype)
    norm = RowNorm(row.new_zeros(variant.dim), 1e-6)
    cos_sin = torch.zeros((tokens, variant.head_dim), device=device)
    cache = (1, past + tokens, variant.dim // variant.head_dim, variant.head_dim)
    keys, values = row.new_zeros(cache), row.new_zeros(cache)
    launch_rotary_store(kernel, (row, row, row), (norm, norm), cos_sin, keys, values, past)


def _try_out_fp8(kernel: Any, device: torch.device, dtype: torch.dtype, variant: RotaryVariant) -> None:  # noqa: ANN401
    tokens, past = 1, 3
    row = torch.zeros((1, tokens, variant.dim), device=device, dtype=dtype)
    norm = RowNorm(row.new_zeros(variant.dim), 1e-6)
    cos_sin = torch.zeros((tokens, variant.head_dim), device=device)
    heads = variant.dim // variant.head_dim
    scale = torch.ones((1, heads), device=device)
    cache = (1, past + tokens, heads, variant.head_dim)
    keys, values = (torch.zeros(cache, device=device, dtype=FP8_DTYPE) for _ in range(2))
    stores = (scale,) * 3, keys, values, past, FP8_DTYPE
    launch_rotary_store_fp8(kernel, (row, row, row), (norm, norm), cos_sin, *stores)


def _check(variant: RotaryVariant) -> str | None:
    if variant.head_dim % 2:
        return f"needs an even head_dim, this is {variant.head_dim}"
    if variant.dim > MOST_BLOCK_VALUES:
        return f"needs rows of at most {MOST_BLOCK_VALUES} values, this is {variant.dim}"
    return None


def _check_fp8(variant: RotaryVariant) -> str | None:
    if variant.head_dim != next_power_of_two(variant.head_dim):
        return f"needs a head_dim that is a power of two, this is {variant.head_dim}"
    return _check(variant)


ROTARY_STORE = Kernel(
    KernelName.ROTARY_STORE,
    "rotary_store_triton.norm_rotate_and_store",
    _try_out,
    check_variant=_check,
)
ROTARY_STORE_FP8 = Kernel(
    KernelName.ROTARY_STORE_FP8,
    "rotary_store_triton.norm_rotate_and_quantize",
    _try_out_fp8,
    # The lowest with FP8 conversions.
    first_capability=(8, 9),
    check_variant=_check_fp8,
)
