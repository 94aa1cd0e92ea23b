"""Attention as torch has it, over keys and values [1, tokens, heads, head_dim] of a padded text."""

import torch
from torch.nn import functional as F


def attend_to_all(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    attended = F.scaled_dot_product_attention(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2))
    return attended.transpose(1, 2)


def pad(part: torch.Tensor, words: int) -> torch.Tensor:
    """All tokens after the first `words` become equal, like Wan's padding."""
    return torch.cat([part[:, :words], part[:, words : words + 1].expand_as(part[:, words:])], dim=1)
