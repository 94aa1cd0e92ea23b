"""Text embeddings of several prompts become one."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .block_prompt import SLERP
from .conditioning import fit_tokens

# Cosine of two tokens' angle from which on an arc is a line within float32's rounding.
_PARALLEL = 0.9995


def mix_embeds(weighted: Sequence[tuple[torch.Tensor, float]], interpolation: str) -> torch.Tensor:
    """Mix embeddings token by token; a token that is zero (padding) in all of them stays zero.

    Args:
        weighted: embeddings, each [1, any tokens, width], and their shares, which add up to 1.
        interpolation: "linear": their weighted sum. "slerp": on the arc between the first and the second, from there
            to the third, and so on, each by its share of what is mixed so far.

    Returns:
        [1, the most tokens, width] in the first one's dtype; the one itself where there is only one.
    """
    first = weighted[0][0]
    if len(weighted) == 1:
        return first
    tokens = max(embeds.shape[1] for embeds, _ in weighted)
    padded = [fit_tokens(embeds.float(), tokens) for embeds, _ in weighted]
    shares = [share for _, share in weighted]
    if interpolation == SLERP:
        mixed, whole = padded[0], shares[0]
        for embeds, share in zip(padded[1:], shares[1:], strict=True):
            whole += share
            mixed = slerp_tokens(mixed, embeds, share / whole)
    else:
        mixed = torch.zeros_like(padded[0])
        for embeds, share in zip(padded, shares, strict=True):
            mixed += share * embeds
    return mixed.to(first.dtype)


def slerp_tokens(start: torch.Tensor, end: torch.Tensor, share: float) -> torch.Tensor:
    """Spherical interpolation (Shoemake 1985) of each token, float32 [1, tokens, width]; `share` 0 is the start.

    Tokens that have no arc between them are mixed linearly: parallel or opposite ones, and where one is zero.
    """
    norms = start.norm(dim=-1, keepdim=True) * end.norm(dim=-1, keepdim=True)
    cosine = (start * end).sum(-1, keepdim=True) / norms.clamp(min=1e-12)
    angle = cosine.clamp(-1.0, 1.0).acos()
    sine = angle.sin()
    has_arc = (norms > 0) & (cosine.abs() < _PARALLEL)
    sine = torch.where(has_arc, sine, 1.0)
    from_start = torch.where(has_arc, ((1.0 - share) * angle).sin() / sine, 1.0 - share)
    from_end = torch.where(has_arc, (share * angle).sin() / sine, share)
    return from_start * start + from_end * end
