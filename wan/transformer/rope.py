"""Rotary position embedding whose frame axis starts at the stream's position."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import nn

ROPE_THETA = 10000.0

RotaryTable = tuple[torch.Tensor, torch.Tensor]
_Place = tuple[int, tuple[int, int, int], torch.device]

# `recompute` alternates between two offsets (context, block); `rolling` uses one per block.
_KEPT_PLACES = 2


@dataclass
class RotaryTables:
    """The tables of the last positions in time of a stream's passes; freed with its KV cache.

    Attributes:
        kept: at most two, least recently used first, so memory does not grow with the stream.
    """

    kept: dict[_Place, RotaryTable] = field(default_factory=dict)

    def find(self, place: _Place) -> RotaryTable | None:
        """The table of `place`, now the most recently used; None if it is not kept."""
        table = self.kept.pop(place, None)
        if table is not None:
            self.kept[place] = table
        return table

    def keep(self, place: _Place, table: RotaryTable) -> None:
        """Keep `table` in place of the least recently used one."""
        if len(self.kept) >= _KEPT_PLACES:
            self.kept.pop(next(iter(self.kept)))
        self.kept[place] = table


class FrameOffsetRotaryEmbedding(nn.Module):
    """Wan's 3-D rotary embedding with a frame offset; takes the place of `WanTransformer3DModel.rope`.

    diffusers' own module counts frames from 0 and has a table of 1,024 frames, which a stream exceeds at
    block 341. Here the angles come from the formula (Su et al. 2021, RoFormer, theta = 10,000) in float64,
    so any offset works. With `frame_offset` 0 the values equal diffusers'.

    Attributes:
        frame_offset: latent frame at which the next forward starts.
        groups: how many times as many frames the tables have as a forward's input: of inputs that follow one another in
            time and are a batch.
        tables: of the current stream; None computes them at every forward.
    """

    def __init__(self, head_dim: int, patch_size: tuple[int, int, int]) -> None:
        super().__init__()
        self.patch_size = patch_size
        spatial_dim = 2 * (head_dim // 6)
        self.axis_dims = (head_dim - 2 * spatial_dim, spatial_dim, spatial_dim)
        self.frame_offset = 0
        self.groups = 1
        self.tables: RotaryTables | None = None
        self._given: RotaryTable | None = None

    @contextmanager
    def given_table(self, table: RotaryTable) -> Iterator[None]:
        """Inside, `table` is what every forward returns."""
        self._given = table
        try:
            yield
        finally:
            self._given = None

    def forward(self, hidden_states: torch.Tensor) -> RotaryTable:
        """Tables for the patches of a latent video.

        Args:
            hidden_states: [batch, channels, latent frames, height, width]; only shape and device are read.

        Returns:
            Two float32 tensors [1, tokens, 1, head_dim / 2, 2] for `apply_rotary`: (cos, sin) and (-sin, cos)
            of each pair. diffusers' layout stores each value twice and needs more passes over memory.
        """
        if self._given is not None:
            return self._given
        frames, height, width = (n // p for n, p in zip(hidden_states.shape[2:], self.patch_size, strict=True))
        place = (self.frame_offset, (self.groups * frames, height, width), hidden_states.device)
        table = None if self.tables is None else self.tables.find(place)
        if table is None:
            table = _make_table(place, self.axis_dims)
            if self.tables is not None:
                self.tables.keep(place, table)
        return table


def _make_table(place: _Place, axis_dims: tuple[int, int, int]) -> RotaryTable:
    offset, sizes, device = place
    frames, height, width = sizes
    time, rows, columns = (
        _axis_cos_sin(start, size, dim, device)
        for start, size, dim in zip((offset, 0, 0), sizes, axis_dims, strict=True)
    )
    grid = (2, frames, height, width, -1)
    cos, sin = torch.cat(
        [
            time.view(2, frames, 1, 1, -1).expand(grid),
            rows.view(2, 1, height, 1, -1).expand(grid),
            columns.view(2, 1, 1, width, -1).expand(grid),
        ],
        dim=-1,
    ).reshape(2, 1, frames * height * width, 1, -1)
    return torch.stack((cos, sin), dim=-1), torch.stack((-sin, cos), dim=-1)


def _axis_cos_sin(start: int, size: int, dim: int, device: torch.device) -> torch.Tensor:
    """Float32 [2, size, dim / 2]: cos and sin of the angles of one axis."""
    # On the CPU because MPS has no float64. These are kilobytes; the grid is expanded on the device.
    positions = torch.arange(start, start + size, dtype=torch.float64, device="cpu")
    frequencies = 1.0 / ROPE_THETA ** (torch.arange(0, dim, 2, dtype=torch.float64, device="cpu") / dim)
    angles = torch.outer(positions, frequencies)
    values = torch.stack((angles.cos(), angles.sin())).float()
    if device.type == "cuda":
        # A copy from pinned memory is queued; from pageable memory the host would wait for the whole queue.
        return values.pin_memory().to(device, non_blocking=True)
    return values.to(device)


def apply_rotary(hidden_states: torch.Tensor, cos_sin: torch.Tensor, minus_sin_cos: torch.Tensor) -> torch.Tensor:
    """Rotate adjacent pairs (a, b) of the last axis: a * (cos, sin) + b * (-sin, cos).

    Launches two kernels in eager mode, without a strided write or a stack, and one when compiled.

    Args:
        hidden_states: [batch, tokens, heads, head_dim].
        cos_sin: float32 [1, tokens, 1, head_dim / 2, 2].
        minus_sin_cos: the same shape.

    Returns:
        Float32, the shape of `hidden_states`; the caller casts it when storing it.
    """
    first, second = hidden_states.unflatten(-1, (-1, 2)).split(1, dim=-1)
    return torch.addcmul(first * cos_sin, second, minus_sin_cos).flatten(-2)
