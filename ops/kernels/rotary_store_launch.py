"""The kernel of `rotary_store`: norm and rotate queries and keys, write keys and values to the cache."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

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


def _try_out(kernel: Any, device: torch.device, dtype: torch.dtype, variant: RotaryVariant) -> None:  # noqa: ANN401
    tokens, past = 1, 3
    row = torch.zeros((1, tokens, variant.dim), device=device, dtype=dtype)
    norm = RowNorm(row.new_zeros(variant.dim), 1e-6)
    cos_sin = torch.zeros((tokens, variant.head_dim), device=device)
    cache = (1, past + tokens, variant.dim // variant.head_dim, variant.head_dim)
    keys, values = row.new_zeros(cache), row.new_zeros(cache)
    launch_rotary_store(kernel, (row, row, row), (norm, norm), cos_sin, keys, values, past)


def _check(variant: RotaryVariant) -> str | None:
    if variant.head_dim % 2:
        return f"needs an even head_dim, this is {variant.head_dim}"
    if variant.dim > MOST_BLOCK_VALUES:
        return f"needs rows of at most {MOST_BLOCK_VALUES} values, this is {variant.dim}"
    return None


ROTARY_STORE = Kernel(
    KernelName.ROTARY_STORE,
    "rotary_store_triton.norm_rotate_and_store",
    _try_out,
    check_variant=_check,
)
