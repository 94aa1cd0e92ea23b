"""Queries, keys and values in e4m3fn with one scale per head, as FlashAttention 3 takes them."""

from __future__ import annotations

import torch

from .fp8_linear import FP8_DTYPE, FP8_MAX, fp8_scale

# Every so many tokens' keys make the mean that smoothing takes away: any constant will do, and this one costs one
# sixteenth of a pass over the keys.
_SAMPLED_TOKENS = 16


def quantize_heads(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Round to e4m3fn with a scale per head, which maps the head's largest magnitude onto 448.

    Args:
        values: [batch, tokens, heads, head_dim] of any float dtype.

    Returns:
        float8_e4m3fn, contiguous and of the shape of `values`, and its scale, float32 [batch, heads].
    """
    # In two steps, the second over 1 / head_dim of the values: compiled, the first is a reduction of contiguous rows.
    magnitude = values.abs().amax(dim=3).amax(dim=1).float()
    scale = fp8_scale(magnitude)
    quotient = values.float() / scale[:, None, :, None]
    return quotient.clamp(-FP8_MAX, FP8_MAX).to(FP8_DTYPE).contiguous(), scale


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
