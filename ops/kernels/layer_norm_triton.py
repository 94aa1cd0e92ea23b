"""Triton source of `layer_norm_launch`: residual, layer norm, rows as float8_e4m3fn. Imported only where it runs."""

from __future__ import annotations

import triton
import triton.language as tl

# mypy: ignore-errors


@triton.jit
def add_piece(  # noqa: ANN201
    hidden,  # noqa: ANN001
    added,  # noqa: ANN001
    gate,  # noqa: ANN001
    summed,  # noqa: ANN001
    place,  # noqa: ANN001
    column,  # noqa: ANN001
    mask,  # noqa: ANN001
    HAS_ADDED: tl.constexpr,  # noqa: N803
    HAS_GATE: tl.constexpr,  # noqa: N803
):
    """hidden + gate * added of some columns in float32; stored rounded."""
    values = tl.load(hidden + place + column, mask, eviction_policy="evict_first").to(tl.float32)
    if HAS_ADDED:
        more = tl.load(added + place + column, mask, eviction_policy="evict_first").to(tl.float32)
        if HAS_GATE:
            more *= tl.load(gate + column, mask, eviction_policy="evict_last").to(tl.float32)
        values += more
        tl.store(summed + place + column, values.to(summed.dtype.element_ty), mask)
    return values


@triton.jit
def scale_piece(normed, gain, shift, column, mask, ADD_ONE: tl.constexpr):  # noqa: ANN001, ANN201, N803
    """normed * gain + shift of some columns; the vectors stay in the cache, each row reads them."""
    factor = tl.load(gain + column, mask, eviction_policy="evict_last").to(tl.float32)
    if ADD_ONE:
        factor += 1.0
    return normed * factor + tl.load(shift + column, mask, eviction_policy="evict_last").to(tl.float32)


@triton.jit
def fold(first, rest):  # noqa: ANN001, ANN201
    """`first` cut into parts as long as `rest`: [parts, columns]."""
    return tl.reshape(first, (first.shape[0] // rest.shape[0], rest.shape[0]))


@triton.jit
def add_norm_quantize(  # noqa: ANN201
    hidden,  # noqa: ANN001
    added,  # noqa: ANN001
    gate,  # noqa: ANN001
    gain,  # noqa: ANN001
    shift,  # noqa: ANN001
    summed,  # noqa: ANN001
    normed,  # noqa: ANN001
    scales,  # noqa: ANN001
    group_rows,  # noqa: ANN001
    gate_step,  # noqa: ANN001
    gain_step,  # noqa: ANN001
    COLUMNS: tl.constexpr,  # noqa: N803
    # A compile-time constant: inductor passes a Python float as float64.
    EPSILON: tl.constexpr,  # noqa: N803
    LARGEST: tl.constexpr,  # noqa: N803
    SMALLEST_SCALE: tl.constexpr,  # noqa: N803
    HAS_ADDED: tl.constexpr,  # noqa: N803
    HAS_GATE: tl.constexpr,  # noqa: N803
    ADD_ONE: tl.constexpr,  # noqa: N803
    QUANTIZE: tl.constexpr,  # noqa: N803
    FIRST: tl.constexpr,  # noqa: N803
    REST: tl.constexpr,  # noqa: N803
):
    """One program per row, which is read once and stays in registers, in two powers of two: 5,120 is 4,096 + 1,024."""
    row = tl.program_id(0).to(tl.int64)
    place = row * COLUMNS
    group = row // group_rows
    gate += group * gate_step
    gain += group * gain_step
    shift += group * gain_step
    columns = tl.arange(0, FIRST)
    last = FIRST + tl.arange(0, REST)
    mask = None
    if FIRST + REST != COLUMNS:
        mask = last < COLUMNS
    first = add_piece(hidden, added, gate, summed, place, columns, None, HAS_ADDED, HAS_GATE)
    rest = add_piece(hidden, added, gate, summed, place, last, mask, HAS_ADDED, HAS_GATE)
    if FIRST + REST != COLUMNS:
        rest = tl.where(mask, rest, 0.0)
    mean = tl.sum(tl.sum(fold(first, rest), axis=0) + rest, axis=0) / COLUMNS
    first -= mean
    rest -= mean
    if FIRST + REST != COLUMNS:
        rest = tl.where(mask, rest, 0.0)
    squares = tl.sum(fold(first * first, rest), axis=0) + rest * rest
    deviation = tl.rsqrt(tl.sum(squares, axis=0) / COLUMNS + EPSILON)
    first = scale_piece(first * deviation, gain, shift, columns, None, ADD_ONE)
    rest = scale_piece(rest * deviation, gain, shift, last, mask, ADD_ONE)
    if QUANTIZE:
        if FIRST + REST != COLUMNS:
            rest = tl.where(mask, rest, 0.0)
        largest = tl.maximum(tl.max(fold(tl.abs(first), rest), axis=0), tl.abs(rest))
        scale = tl.maximum(tl.div_rn(tl.max(largest, axis=0), LARGEST), SMALLEST_SCALE)
        tl.store(scales + row, scale)
        # One division a row; a product is within 2 units in the last place of the quotient.
        reciprocal = tl.div_rn(1.0, scale)
        first *= reciprocal
        rest *= reciprocal
        # As many columns a thread as it has loaded: for 16 bytes of FP8 it would take its neighbour's too.
        columns = tl.max_contiguous(tl.multiple_of(columns, 8), 8)
        last = tl.max_contiguous(tl.multiple_of(last, 8), 8)
    tl.store(normed + place + columns, first.to(normed.dtype.element_ty), None)
    tl.store(normed + place + last, rest.to(normed.dtype.element_ty), mask)
