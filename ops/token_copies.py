"""Tokens copied from one buffer to another; in compiled code by operators that torch.compile does not look into.

In float8_e4m3fn inductor cannot write to a part of a buffer: it fills a new one with NaN first, which Triton 3.6 does
not have in that dtype; on a CPU it refuses to choose between old and new values; and bytes in place of them would be
written to a view of another dtype, for which it has no code (torch 2.11 and 2.13).
"""

from __future__ import annotations

from collections.abc import Iterable

import torch


def copy_tokens(buffer: torch.Tensor, place: int, tokens: torch.Tensor) -> None:
    """Copy `tokens` [batch, tokens, ...] to `buffer` [batch, capacity, ...], from `place` on; both of one dtype."""
    # As bytes: not every device copies 8-bit floats into a part of a tensor.
    buffer[:, place : place + tokens.shape[1]].view(torch.uint8).copy_(tokens.view(torch.uint8))


def copy_in_a_row(buffer: torch.Tensor, parts: Iterable[torch.Tensor]) -> None:
    """Copy `parts` one behind another to the front of `buffer`, each as `copy_tokens` does."""
    place = 0
    for part in parts:
        copy_tokens(buffer, place, part)
        place += part.shape[1]


@torch.library.custom_op("streamblocks::join_tokens", mutates_args=())
def join_tokens(parts: list[torch.Tensor], room: int) -> torch.Tensor:
    """Join `parts` and leave room behind them.

    Args:
        parts: each [1, tokens, heads, head_dim], of one dtype; any may be empty.
        room: tokens behind them, whose values are not set.

    Returns:
        [1, tokens of all parts + room, heads, head_dim].
    """
    joined = _make_room(parts, room)
    copy_in_a_row(joined, parts)
    return joined


@join_tokens.register_fake
def _make_room(parts: list[torch.Tensor], room: int) -> torch.Tensor:
    return parts[0].new_empty((1, sum(part.shape[1] for part in parts) + room, *parts[0].shape[2:]))


@torch.library.custom_op("streamblocks::write_tokens", mutates_args=("buffer",))
def write_tokens(buffer: torch.Tensor, place: int, tokens: torch.Tensor) -> None:
    """Write `tokens` [1, tokens, heads, head_dim] to `buffer` [1, capacity, heads, head_dim], from `place` on.

    They are of one dtype.
    """
    copy_tokens(buffer, place, tokens)


@write_tokens.register_fake
def _write_nothing(buffer: torch.Tensor, place: int, tokens: torch.Tensor) -> None:
    """Nothing is computed while a graph is traced."""
