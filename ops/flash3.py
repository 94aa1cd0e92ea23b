"""FlashAttention 3 as one operator of torch, whichever package brings it.

Packages: `fa3-fwd` (prebuilt for Hopper, forward only, no float16; module `fa3_fwd_interface`) and the makers' own
(`flash_attn_interface`). Both have `flash_attn_func`. An operator with a fake implementation is opaque to torch.compile
and does not break a graph; the packages' own is wrapped in an autograd function, and older ones have none.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import torch

from .fp8_linear import FP8_DTYPE

FLASH3_MODULES = ("flash_attn_interface", "fa3_fwd_interface")
# Its kernels for 8 bits are for Hopper's units alone.
HOPPER = 9
MOST_HEAD_DIM = 256


def find_flash3() -> str | None:
    """The module of FlashAttention 3 that is installed; None without one. Nothing is imported."""
    return next((name for name in FLASH3_MODULES if importlib.util.find_spec(name) is not None), None)


@functools.cache
def flash3_function() -> Callable[..., Any]:
    """`flash_attn_func` of the installed package.

    Raises:
        ImportError: there is none, or it does not load here.
    """
    name = find_flash3()
    if name is None:
        raise ImportError("FlashAttention 3 is not installed: install the package fa3-fwd.")
    function: Callable[..., Any] = importlib.import_module(name).flash_attn_func
    return function


@torch.library.custom_op("streamblocks::flash3", mutates_args=())
def flash3(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    query_scale: torch.Tensor | None,
    key_scale: torch.Tensor | None,
    value_scale: torch.Tensor | None,
) -> torch.Tensor:
    """softmax(q k / sqrt(head_dim)) v, without a mask.

    Args:
        query: [batch, queries, heads, head_dim], bfloat16, or float8_e4m3fn with scales.
        key: [batch, keys, heads, head_dim], the dtype of `query`.
        value: the shape of `key`, the dtype of `query`.
        query_scale: float32 [batch, heads]: what one unit of `query` means; None for bfloat16.
        key_scale: the same of `key`.
        value_scale: the same of `value`.

    Returns:
        bfloat16 [batch, queries, heads, head_dim].
    """
    made = flash3_function()(
        query, key, value, q_descale=query_scale, k_descale=key_scale, v_descale=value_scale, causal=False
    )
    # Earlier versions return the sums of the softmax, too.
    attended: torch.Tensor = made[0] if isinstance(made, tuple) else made
    return attended


@flash3.register_fake
def _flash3_fake(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    query_scale: torch.Tensor | None,
    key_scale: torch.Tensor | None,
    value_scale: torch.Tensor | None,
) -> torch.Tensor:
    dtype = torch.bfloat16 if query.dtype == FP8_DTYPE else query.dtype
    return torch.empty((*query.shape[:-1], value.shape[-1]), dtype=dtype, device=query.device)
