"""What FlashAttention 3 computes in 8 bits, in torch on any device, so that a CPU shows what its rounding costs.

As its kernel for Hopper does (FlashAttention 3, Shah et al. 2024, and its source): keys in tiles, from the last to the
first, with a running maximum; weights as 2^(score - maximum + 8) rounded to e4m3fn; their sum taken before they are
rounded; products added up in float32; the result divided and scaled in float32, and rounded to bfloat16.
Left out: Hopper's units keep fewer bits than float32 of the sums within a product (about 14), in an order of their own.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import streamblocks_path  # noqa: F401
import torch

from streamblocks.ops import flash3, library_attention
from streamblocks.ops.fp8_linear import FP8_DTYPE, FP8_MAX

# Keys of a tile, by the largest head_dim it is for.
_TILES = {64: 160, 96: 128, 128: 224, 192: 160, 256: 128}
_OFFSET = 8.0


@contextmanager
def emulated_flash3() -> Iterator[None]:
    """Inside, FlashAttention 3 is installed and runs on every device."""

    def runs(*_: Any, **__: Any) -> None:  # noqa: ANN401
        """Nothing is missing."""

    library_attention.ATTENTION_TRIALS.reset()
    with ExitStack() as stack:
        stack.callback(library_attention.ATTENTION_TRIALS.reset)
        stack.enter_context(patch.object(library_attention, "why_not", runs))
        stack.enter_context(patch.object(flash3, "flash3_function", lambda: flash_attn_func))
        yield


def flash_attn_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    causal: bool = False,
    q_descale: torch.Tensor | None = None,
    k_descale: torch.Tensor | None = None,
    v_descale: torch.Tensor | None = None,
) -> torch.Tensor:
    """Under the names of FlashAttention 3's own function.

    Args:
        q: [batch, queries, heads, head_dim], float8_e4m3fn or another float dtype.
        k: [batch, keys, heads, head_dim].
        v: the shape of `k`.
        causal: not emulated.
        q_descale: float32 [batch, heads]; None is 1.
        k_descale: the same.
        v_descale: the same.

    Returns:
        The shape of `q`; bfloat16 where it has 8 bits, else its dtype.

    Raises:
        ValueError: `causal` is set.
    """
    if causal:
        raise ValueError("causal is set: the emulation knows no mask.")
    eight_bits = q.dtype == FP8_DTYPE
    query, key, value = (part.float().transpose(1, 2) for part in (q, k, v))
    factor = _by_head(q_descale, q) * _by_head(k_descale, k) * (q.shape[-1] ** -0.5 / math.log(2.0))
    largest = torch.full((*query.shape[:-1], 1), -math.inf, device=q.device)
    total, made = torch.zeros_like(largest), torch.zeros_like(query)
    for start, end in _tiles(k.shape[1], q.shape[-1]):
        scores = query @ key[:, :, start:end].transpose(2, 3) * factor
        before, largest = largest, torch.maximum(largest, scores.amax(dim=-1, keepdim=True))
        weights = torch.exp2(scores - largest + (_OFFSET if eight_bits else 0.0))
        shrink = torch.exp2(before - largest)
        total = total * shrink + weights.sum(dim=-1, keepdim=True)
        rounded = weights.clamp(max=FP8_MAX).to(FP8_DTYPE) if eight_bits else weights.to(q.dtype)
        made = made * shrink + rounded.float() @ value[:, :, start:end]
    made = made * (_by_head(v_descale, v) / total)
    return made.transpose(1, 2).to(torch.bfloat16 if eight_bits else q.dtype).contiguous()


def _by_head(scale: torch.Tensor | None, like: torch.Tensor) -> torch.Tensor:
    if scale is None:
        return torch.ones((1, 1, 1, 1), device=like.device)
    return scale[:, :, None, None]


def _tiles(keys: int, head_dim: int) -> Iterator[tuple[int, int]]:
    """From the last, which may be a part of one, to the first."""
    tile = next(size for most, size in _TILES.items() if head_dim <= most)
    for start in reversed(range(0, keys, tile)):
        yield start, min(start + tile, keys)
