"""The kernel of `few_key_attention`: softmax attention over a handful of keys."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from .kernel import Kernel, KernelName, launch

_BLOCK_QUERIES = 64
_BLOCK_KEYS = 32


class FewKeyVariant(NamedTuple):
    """What the kernel is compiled for."""

    head_dim: int


def launch_few_keys(
    kernel: Any,  # noqa: ANN401
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bias: torch.Tensor,
    used: torch.Tensor,
) -> torch.Tensor:
    """softmax(q k / sqrt(head_dim) + bias) v over the first `used` keys.

    Args:
        kernel: of `FEW_KEY_ATTENTION.load`.
        query: [1, queries, heads, head_dim], contiguous.
        key: [1, text tokens, heads, head_dim], contiguous.
        value: the shape of `key`, contiguous.
        bias: float32 [used or more].
        used: int32 [1], on the device.

    Returns:
        The shape and dtype of `query`.
    """
    attended = torch.empty_like(query)
    _, queries, heads, head_dim = query.shape
    launch(
        kernel,
        (heads, -(-queries // _BLOCK_QUERIES)),
        query.device,
        query,
        key,
        value,
        bias,
        used,
        attended,
        queries,
        heads,
        SCALE=head_dim**-0.5,
        HEAD_DIM=head_dim,
        BLOCK_QUERIES=_BLOCK_QUERIES,
        BLOCK_KEYS=_BLOCK_KEYS,
        num_warps=4,
        num_stages=1,
    )
    return attended


def _try_out(kernel: Any, device: torch.device, dtype: torch.dtype, variant: FewKeyVariant) -> None:  # noqa: ANN401
    # Three heads and three queries: Triton specialises on 1 and on multiples of 16.
    values = torch.zeros((1, 3, 3, variant.head_dim), device=device, dtype=dtype)
    bias = torch.zeros(_BLOCK_KEYS, device=device)
    launch_few_keys(kernel, values, values, values, bias, torch.ones(1, device=device, dtype=torch.int32))


def _check(variant: FewKeyVariant) -> str | None:
    head_dim = variant.head_dim
    if head_dim < 16 or head_dim & (head_dim - 1):
        return f"needs a head_dim that is a power of two and at least 16, this is {head_dim}"
    return None


FEW_KEY_ATTENTION = Kernel(
    KernelName.FEW_KEY_ATTENTION,
    "few_key_triton.attend_to_few_keys",
    _try_out,
    # In float32 its matrix products would keep 10 bits of the mantissa; torch keeps all.
    dtypes=(torch.bfloat16, torch.float16),
    check_variant=_check,
)
