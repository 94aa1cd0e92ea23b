"""Triton source of `gelu_quantization_launch`: GELU and rows as float8_e4m3fn. Imported only where it runs."""

from __future__ import annotations

import triton
import triton.language as tl

# mypy: ignore-errors


@triton.jit
def gelu_quantize_rows(  # noqa: ANN201
    x,  # noqa: ANN001
    quantized,  # noqa: ANN001
    scales,  # noqa: ANN001
    columns,  # noqa: ANN001
    # A compile-time constant: inductor passes a Python float as float64, which Triton cannot convert to FP8.
    LARGEST: tl.constexpr,  # noqa: N803
    SMALLEST_SCALE: tl.constexpr,  # noqa: N803
    BLOCK: tl.constexpr,  # noqa: N803
):
    """One program per row, which is read once. GELU is x * sigmoid(2 sqrt(2 / pi) (x + 0.044715 x^3))."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    mask = column < columns
    values = tl.load(x + row * columns + column, mask, other=0.0).to(tl.float32)
    values = values * tl.sigmoid(values * (1.5957691216057308 + 0.07135481282553506 * values * values))
    scale = tl.maximum(tl.max(tl.abs(values), axis=0) / LARGEST, SMALLEST_SCALE)
    tl.store(scales + row, scale)
    tl.store(quantized + row * columns + column, (values / scale).to(quantized.dtype.element_ty), mask)
