"""The work between two matrix products of a layer, in one pass over memory: residual, layer norm, quantization.

Each row is read once: the sum with the residual, its mean and variance, gain and shift, and the largest magnitude by
which it is quantized are computed from registers. Compiled torch reads the rows of a norm two or three times.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F

from .fp8_linear import QuantizedRows, fp8_scale, largest_magnitude, round_to_fp8
from .kernels.layer_norm_launch import Residual, RowScaling, launch_layer_norm


def add_and_norm(
    hidden: torch.Tensor,
    scaling: RowScaling,
    residual: Residual | None,
    *,
    quantize: bool,
    kernel: Any = None,  # noqa: ANN401
) -> tuple[torch.Tensor, torch.Tensor | QuantizedRows]:
    """Add the residual, then layer norm (Ba et al. 2016), gain and shift; sums and the norm in float32.

    The kernel norms and quantizes values that were not rounded to the dtype of `hidden` before, torch rounds after
    each step as uncompiled modules do: they differ by that rounding.

    Args:
        hidden: [groups, rows, columns] of any float dtype.
        scaling: gain and shift of each group, and the norm's epsilon.
        residual: None for a norm of `hidden` itself.
        quantize: to float8_e4m3fn with a scale per row, as `FP8Linear` quantizes its input.
        kernel: of `LAYER_NORM.load`; None computes it with torch.

    Returns:
        The sum (`hidden` itself without a residual) and the normed rows, both of the shape and dtype of `hidden` unless
        the rows are quantized.
    """
    if kernel is None:
        return _compute_with_torch(hidden, scaling, residual, quantize=quantize)
    if residual is not None:
        residual = residual._replace(added=residual.added.contiguous())
    made = launch_layer_norm(kernel, hidden.contiguous(), scaling, residual, quantize=quantize)
    summed = hidden if residual is None else made.summed
    if made.scale is None:
        return summed, made.normed
    return summed, QuantizedRows(made.normed, made.scale, hidden.dtype)


def _compute_with_torch(
    hidden: torch.Tensor, scaling: RowScaling, residual: Residual | None, *, quantize: bool
) -> tuple[torch.Tensor, torch.Tensor | QuantizedRows]:
    columns = hidden.shape[-1]
    if residual is not None:
        added = residual.added.float()
        if residual.gate is not None:
            added = added * residual.gate.float().unsqueeze(1)
        hidden = (hidden.float() + added).to(hidden.dtype)
    gain = scaling.gain.float().unsqueeze(1)
    normed = F.layer_norm(hidden.float(), (columns,), eps=scaling.epsilon)
    normed = normed * (1.0 + gain if scaling.adds_one else gain) + scaling.shift.float().unsqueeze(1)
    normed = normed.to(hidden.dtype)
    if not quantize:
        return hidden, normed
    rows = normed.reshape(-1, columns)
    scale = fp8_scale(largest_magnitude(rows, "per row"))
    return hidden, QuantizedRows(round_to_fp8(rows, scale).view(hidden.shape), scale, hidden.dtype)
