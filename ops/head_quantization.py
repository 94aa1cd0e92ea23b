"""Queries, keys and values in e4m3fn with one scale per head, as FlashAttention 3 takes them.

A scale is found for the values of a call (`quantize_heads`), or fixed beforehand (`HeadScales`). A fixed one need not
be exact: e4m3fn has the same relative steps from 2^-6 to 448, so with a scale that is 16 times too large all that is
larger than 1/1,792 of the largest value is still rounded alike.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from .fp8_linear import FP8_DTYPE, FP8_MAX, fp8_scale

# Every so many tokens' keys make the mean that smoothing takes away: any constant will do, and this one costs one
# sixteenth of a pass over the keys.
_SAMPLED_TOKENS = 16
# How many times larger values may be than those that a fixed scale was found for.
_MARGIN = 16.0


class HeadScales(NamedTuple):
    """What one unit of e4m3fn means in each head, float32 [1, heads] each.

    Attributes:
        query: of queries.
        key: of keys.
        value: of values.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor

    @classmethod
    def allocate(cls, heads: int, device: torch.device) -> HeadScales:
        """Scales of 1."""
        return cls(*(torch.ones((1, heads), device=device) for _ in range(3)))


def scale_with_margin(values: torch.Tensor) -> torch.Tensor:
    """A scale for values up to 16 times as large as these [batch, tokens, heads, head_dim]: float32 [batch, heads].

    A power of two times the scale of the largest: numbers just below a power of two have the finest steps for their
    size, and the largest is often one of many that are about as large, in a channel that decides the scores.
    """
    return fp8_scale(_largest_by_head(values) * _MARGIN)


def round_heads(values: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """`values` [batch, tokens, heads, head_dim] in units of `scale` [batch, heads], clamped and rounded to e4m3fn."""
    quotient = values.float() / scale[:, None, :, None]
    return quotient.clamp(-FP8_MAX, FP8_MAX).to(FP8_DTYPE)


def unround_heads(values: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What e4m3fn [batch, tokens, heads, head_dim] in units of `scale` [batch, heads] means, in `dtype`."""
    return (values.float() * scale[:, None, :, None]).to(dtype)


def quantize_heads(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Round to e4m3fn with a scale per head, which maps the head's largest magnitude onto 448.

    Args:
        values: [batch, tokens, heads, head_dim] of any float dtype.

    Returns:
        float8_e4m3fn, contiguous and of the shape of `values`, and its scale, float32 [batch, heads].
    """
    scale = fp8_scale(_largest_by_head(values))
    return round_heads(values, scale).contiguous(), scale


def _largest_by_head(values: torch.Tensor) -> torch.Tensor:
    # In two steps, the second over 1 / head_dim of the values: compiled, the first is a reduction of contiguous rows.
    return values.abs().amax(dim=3).amax(dim=1).float()


def smooth_keys(keys: torch.Tensor) -> torch.Tensor:
    """Take a constant from each channel of each head: about the mean over tokens.

    q . (k - c) differs from q . k by the same amount for every key, which softmax does not see (as in SageAttention,
    Zhang et al. 2024, section 4.2). What keys have in common no longer takes part in rounding.

    Args:
        keys: [batch, tokens, heads, head_dim]; all keys that a query sees.

    Returns:
        float32, the shape of `keys`: rounded to 16 bits in between, small differences would be lost.
    """
    constant = keys[:, ::_SAMPLED_TOKENS].float().mean(dim=1, keepdim=True)
    return keys.float() - constant
