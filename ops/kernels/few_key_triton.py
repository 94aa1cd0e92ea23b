"""Triton source of `few_key_launch`: attention over a handful of keys. Imported only where it runs."""

from __future__ import annotations

import triton
import triton.language as tl

# mypy: ignore-errors

_LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def attend_to_few_keys(  # noqa: ANN201
    query,  # noqa: ANN001
    key,  # noqa: ANN001
    value,  # noqa: ANN001
    bias,  # noqa: ANN001
    used,  # noqa: ANN001
    attended,  # noqa: ANN001
    queries,  # noqa: ANN001
    heads,  # noqa: ANN001
    # A compile-time constant: inductor passes a Python float as float64.
    SCALE: tl.constexpr,  # noqa: N803
    HEAD_DIM: tl.constexpr,  # noqa: N803
    BLOCK_QUERIES: tl.constexpr,  # noqa: N803
    BLOCK_KEYS: tl.constexpr,  # noqa: N803
):
    """See `launch_few_keys`. Grid: heads x blocks of queries; softmax is taken online (Dao et al. 2022)."""
    place = (tl.program_id(1) * BLOCK_QUERIES + tl.arange(0, BLOCK_QUERIES)).to(tl.int64)
    channel = tl.program_id(0) * HEAD_DIM + tl.arange(0, HEAD_DIM)
    row = heads * HEAD_DIM
    is_query = (place < queries)[:, None]
    asked = tl.load(query + place[:, None] * row + channel[None, :], is_query, other=0.0)
    count = tl.load(used)
    largest = tl.full((BLOCK_QUERIES,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_QUERIES,), tl.float32)
    mixed = tl.zeros((BLOCK_QUERIES, HEAD_DIM), tl.float32)
    for first in range(0, count, BLOCK_KEYS):
        keys = first + tl.arange(0, BLOCK_KEYS)
        is_key = keys < count
        offered = tl.load(key + keys[None, :] * row + channel[:, None], is_key[None, :], other=0.0)
        # In base 2, because exp2 is one instruction.
        added = tl.load(bias + keys, is_key, other=float("-inf")) * _LOG2_E
        scores = tl.dot(asked, offered) * (SCALE * _LOG2_E) + added[None, :]
        larger = tl.maximum(largest, tl.max(scores, axis=1))
        weights = tl.exp2(scores - larger[:, None])
        kept = tl.exp2(largest - larger)
        held = tl.load(value + keys[:, None] * row + channel[None, :], is_key[:, None], other=0.0)
        mixed = mixed * kept[:, None] + tl.dot(weights.to(held.dtype), held)
        total = total * kept + tl.sum(weights, axis=1)
        largest = larger
    tl.store(attended + place[:, None] * row + channel[None, :], mixed / total[:, None], is_query)
