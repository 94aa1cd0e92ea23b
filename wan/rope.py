"""Rotary position embedding whose frame axis starts where the stream is."""

from __future__ import annotations

import torch
from torch import nn

ROPE_THETA = 10000.0


class FrameOffsetRotaryEmbedding(nn.Module):
    """Wan's 3-D rotary embedding with a frame offset; takes the place of `WanTransformer3DModel.rope`.

    diffusers' own module counts frames from 0 and holds a table of 1,024 of them; a stream passes that at
    block 341. Here the angles come from the formula (Su et al. 2021, RoFormer, theta = 10,000) in float64,
    so any offset works. With `frame_offset` 0 the values equal diffusers'.
    """

    def __init__(self, head_dim: int, patch_size: tuple[int, int, int]) -> None:
        super().__init__()
        self.patch_size = patch_size
        spatial_dim = 2 * (head_dim // 6)
        self.axis_dims = (head_dim - 2 * spatial_dim, spatial_dim, spatial_dim)
        self.frame_offset = 0

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Angles for the patches of a latent video.

        Args:
            hidden_states: [batch, channels, latent frames, height, width]; only shape and device are read.

        Returns:
            cos and sin, float32 [1, tokens, 1, head_dim], each value twice in a row (diffusers' layout).
        """
        sizes = [n // p for n, p in zip(hidden_states.shape[2:], self.patch_size, strict=True)]
        starts = (self.frame_offset, 0, 0)
        angles = [
            _axis_angles(start, size, dim) for start, size, dim in zip(starts, sizes, self.axis_dims, strict=True)
        ]
        frames, height, width = sizes
        grid = torch.cat(
            [
                angles[0].view(frames, 1, 1, -1).expand(frames, height, width, -1),
                angles[1].view(1, height, 1, -1).expand(frames, height, width, -1),
                angles[2].view(1, 1, width, -1).expand(frames, height, width, -1),
            ],
            dim=-1,
        ).reshape(1, frames * height * width, 1, -1)
        device = hidden_states.device
        return grid.cos().float().to(device), grid.sin().float().to(device)


def _axis_angles(start: int, size: int, dim: int) -> torch.Tensor:
    # On the CPU because MPS has no float64; the tables are a few kilobytes per axis.
    positions = torch.arange(start, start + size, dtype=torch.float64)
    frequencies = 1.0 / ROPE_THETA ** (torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    return torch.outer(positions, frequencies).repeat_interleave(2, dim=1)


def apply_rotary(hidden_states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate adjacent pairs of the last axis.

    Args:
        hidden_states: [batch, tokens, heads, head_dim].
        cos: float32 [1, tokens, 1, head_dim], each value twice in a row.
        sin: the same for the sine.

    Returns:
        The same shape and dtype as `hidden_states`; the product is taken in float32.
    """
    even, odd = hidden_states.unflatten(-1, (-1, 2)).unbind(-1)
    half_cos, half_sin = cos[..., 0::2], sin[..., 0::2]
    rotated = torch.stack((even * half_cos - odd * half_sin, even * half_sin + odd * half_cos), dim=-1)
    return rotated.flatten(-2).to(hidden_states.dtype)
