"""Triton source of `rotary_store_launch`. Imported only where it runs."""

from __future__ import annotations

import triton
import triton.language as tl

# mypy: ignore-errors


@triton.jit
def norm_and_rotate(x, gamma, column, mask, angles, DIM: tl.constexpr, EPSILON: tl.constexpr):  # noqa: ANN001, ANN201, N803
    """One row: x / rms(x) * gamma, then each pair (a, b) rotated: (a cos - b sin, a sin + b cos)."""
    values = tl.load(x + column, mask, other=0.0).to(tl.float32)
    weight = tl.load(gamma + column, mask, other=0.0).to(tl.float32)
    values = values * tl.rsqrt(tl.sum(values * values, axis=0) / DIM + EPSILON) * weight
    first, second = tl.split(tl.reshape(values, (column.shape[0] // 2, 2)))
    cos, sin = tl.split(tl.reshape(angles, (column.shape[0] // 2, 2)))
    turned = tl.join(first * cos - second * sin, first * sin + second * cos)
    return tl.reshape(turned, (column.shape[0],))


@triton.jit
def norm_rotate_and_store(  # noqa: ANN201
    query,  # noqa: ANN001
    key,  # noqa: ANN001
    value,  # noqa: ANN001
    row_step,  # noqa: ANN001
    query_gamma,  # noqa: ANN001
    key_gamma,  # noqa: ANN001
    cos_sin,  # noqa: ANN001
    rotated,  # noqa: ANN001
    keys,  # noqa: ANN001
    values,  # noqa: ANN001
    past,  # noqa: ANN001
    DIM: tl.constexpr,  # noqa: N803
    HEAD_DIM: tl.constexpr,  # noqa: N803
    # A compile-time constant: inductor passes a Python float as float64.
    QUERY_EPSILON: tl.constexpr,  # noqa: N803
    KEY_EPSILON: tl.constexpr,  # noqa: N803
    BLOCK: tl.constexpr,  # noqa: N803
):
    """One program per token, read once; queries go to `rotated`, keys and values to the cache after `past`."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    mask = column < DIM
    angles = tl.load(cos_sin + token * HEAD_DIM + column % HEAD_DIM)
    turned = norm_and_rotate(query + token * row_step, query_gamma, column, mask, angles, DIM, QUERY_EPSILON)
    tl.store(rotated + token * DIM + column, turned, mask)
    turned = norm_and_rotate(key + token * row_step, key_gamma, column, mask, angles, DIM, KEY_EPSILON)
    slot = (past + token) * DIM + column
    tl.store(keys + slot, turned, mask)
    tl.store(values + slot, tl.load(value + token * row_step + column, mask, other=0.0), mask)


@triton.jit
def in_units(values, scales, DIM: tl.constexpr, HEAD_DIM: tl.constexpr, LARGEST: tl.constexpr):  # noqa: ANN001, ANN201, N803
    """Values of a row divided by their heads' scales, each loaded once, within the range of e4m3fn."""
    head = tl.arange(0, values.shape[0] // HEAD_DIM)
    inverse = 1.0 / tl.load(scales + head, head < DIM // HEAD_DIM, other=1.0)
    by_head = tl.reshape(values, (values.shape[0] // HEAD_DIM, HEAD_DIM)) * inverse[:, None]
    return tl.reshape(tl.minimum(tl.maximum(by_head, -LARGEST), LARGEST), (values.shape[0],))


@triton.jit
def norm_rotate_and_quantize(  # noqa: ANN201
    query,  # noqa: ANN001
    key,  # noqa: ANN001
    value,  # noqa: ANN001
    row_step,  # noqa: ANN001
    query_gamma,  # noqa: ANN001
    key_gamma,  # noqa: ANN001
    cos_sin,  # noqa: ANN001
    query_scale,  # noqa: ANN001
    key_scale,  # noqa: ANN001
    value_scale,  # noqa: ANN001
    rotated,  # noqa: ANN001
    keys,  # noqa: ANN001
    values,  # noqa: ANN001
    past,  # noqa: ANN001
    DIM: tl.constexpr,  # noqa: N803
    HEAD_DIM: tl.constexpr,  # noqa: N803
    QUERY_EPSILON: tl.constexpr,  # noqa: N803
    KEY_EPSILON: tl.constexpr,  # noqa: N803
    LARGEST: tl.constexpr,  # noqa: N803
    # Whether `rotated` is in 8 bits, too.
    QUANTIZES_QUERY: tl.constexpr,  # noqa: N803
    BLOCK: tl.constexpr,  # noqa: N803
):
    """`norm_rotate_and_store` with keys and values in 8 bits, each head in units of its scale."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    mask = column < DIM
    angles = tl.load(cos_sin + token * HEAD_DIM + column % HEAD_DIM)
    turned = norm_and_rotate(query + token * row_step, query_gamma, column, mask, angles, DIM, QUERY_EPSILON)
    if QUANTIZES_QUERY:
        turned = in_units(turned, query_scale, DIM, HEAD_DIM, LARGEST)
    tl.store(rotated + token * DIM + column, turned.to(rotated.dtype.element_ty), mask)
    turned = norm_and_rotate(key + token * row_step, key_gamma, column, mask, angles, DIM, KEY_EPSILON)
    slot = (past + token) * DIM + column
    turned = in_units(turned, key_scale, DIM, HEAD_DIM, LARGEST)
    tl.store(keys + slot, turned.to(keys.dtype.element_ty), mask)
    given = tl.load(value + token * row_step + column, mask, other=0.0).to(tl.float32)
    given = in_units(given, value_scale, DIM, HEAD_DIM, LARGEST)
    tl.store(values + slot, given.to(values.dtype.element_ty), mask)
