"""One layer of a pass of two blocks, of which the second no longer sees the oldest keys that the first one sees.

Keys leave the cache only after the pass. So the second block attends to a copy of what will be left, and a pass that
fails on the way, as when memory runs out, can be made again from the cache as it was.
"""

from __future__ import annotations

import torch

from ...ops.token_copies import join_tokens
from .attention_passes import SelfAttentionPass
from .eight_bits import as_packed
from .rope import RotaryTable
from .rotary_store import Projections

_Tokens = tuple[Projections, RotaryTable]


def split_tokens(projections: Projections, rotary_emb: RotaryTable, first: int) -> tuple[_Tokens, _Tokens]:
    """The first so many tokens, and the others: views of the projections and of the rotary tables."""
    parts = (slice(None, first), slice(first, None))
    head, tail = (
        (
            Projections(*(projection[:, part] for projection in projections)),
            (rotary_emb[0][:, part], rotary_emb[1][:, part]),
        )
        for part in parts
    )
    return head, tail


def make_next_window(bound: SelfAttentionPass, tokens: int) -> SelfAttentionPass:
    """The second block's pass: keys and values that it sees, in buffers of its own with room for its `tokens`.

    Args:
        bound: the pass of both blocks; the first one's keys and values have been written after its past.
        tokens: of the second block.
    """
    keys, past = _copy_seen(bound.keys, bound, tokens)
    values, _ = _copy_seen(bound.values, bound, tokens)
    return bound._replace(keys=keys, values=values, past=past, causal_tokens=None, next_window=None)


def _copy_seen(buffer: torch.Tensor, bound: SelfAttentionPass, tokens: int) -> tuple[torch.Tensor, int]:
    """What the second block sees of [1, capacity, heads, head_dim], with free room behind it; and how many tokens."""
    window, written = bound.next_window, bound.causal_tokens
    assert window is not None and written is not None
    newest = buffer[:, bound.past : bound.past + written]
    if window.packs is not None:
        newest = as_packed(newest, window.packs)
    end = bound.past + written
    seen = []
    for start, stop in ((0, min(window.sink, end)), (window.sink + window.dropped, end)):
        # From the past, then from the newest; either may be empty.
        seen.append(buffer[:, start : min(stop, bound.past)])
        seen.append(newest[:, max(0, start - bound.past) : max(0, stop - bound.past)])
    return join_tokens(seen, tokens), sum(part.shape[1] for part in seen)
