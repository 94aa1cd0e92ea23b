"""The kernel of `add_and_norm`: residual, layer norm, gain and shift, and row-wise FP8 quantization in one pass."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from .gelu_quantization_launch import FP8_DTYPE, FP8_MAX, SMALLEST_SCALE
from .kernel import MOST_BLOCK_VALUES, Kernel, KernelName, launch, next_power_of_two

_LOADED_TOGETHER = 8
_WARP = 32
_MOST_WARPS = 8


class LayerNormVariant(NamedTuple):
    """What the kernel is compiled for."""

    columns: int
    has_residual: bool
    has_gate: bool
    adds_one: bool
    quantizes: bool


class RowScaling(NamedTuple):
    """What a layer norm is followed by: normed * gain + shift, or normed * (1 + gain) + shift.

    Attributes:
        gain: [groups, columns] of any float dtype, of which every row is contiguous; one for each group of rows, or 1.
        shift: the shape and strides of `gain`.
        adds_one: whether 1 is added to the gain.
        epsilon: added to the variance.
    """

    gain: torch.Tensor
    shift: torch.Tensor
    adds_one: bool
    epsilon: float


class Residual(NamedTuple):
    """What is added before the norm.

    Attributes:
        added: the shape of the rows, of any float dtype.
        gate: [groups, columns], a factor of `added`; every row of it is contiguous. None for 1.
    """

    added: torch.Tensor
    gate: torch.Tensor | None


class NormedBuffers(NamedTuple):
    """What the kernel writes.

    Attributes:
        summed: rows and residual, the shape and dtype of the rows; the rows themselves without a residual.
        normed: float8_e4m3fn where it is quantized, or the dtype of the rows; their shape.
        scale: of `normed`, float32 [groups * rows, 1]; None where it is not quantized.
    """

    summed: torch.Tensor
    normed: torch.Tensor
    scale: torch.Tensor | None


def launch_layer_norm(
    kernel: Any,  # noqa: ANN401
    hidden: torch.Tensor,
    scaling: RowScaling,
    residual: Residual | None,
    *,
    quantize: bool,
) -> NormedBuffers:
    """Add, norm, scale and, if asked for, quantize row by row.

    Args:
        kernel: of `LAYER_NORM.load`.
        hidden: [groups, rows, columns] of any float dtype, contiguous.
        scaling: after the norm.
        residual: contiguous; added and rounded to the dtype of `hidden` for `summed`. The norm reads the sum unrounded.
        quantize: write float8_e4m3fn and a scale per row, of the values in float32.
    """
    groups, rows, columns = hidden.shape
    gate = None if residual is None else residual.gate
    summed = hidden if residual is None else torch.empty_like(hidden)
    normed = torch.empty(hidden.shape, dtype=FP8_DTYPE if quantize else hidden.dtype, device=hidden.device)
    scale = None
    if quantize:
        scale = torch.empty((groups * rows, 1), dtype=torch.float32, device=hidden.device)
    first, rest = _cut(columns)
    launch(
        kernel,
        (groups * rows,),
        hidden.device,
        hidden,
        # Absent inputs are not read and absent outputs not written, but a pointer must be passed.
        hidden if residual is None else residual.added,
        hidden if gate is None else gate,
        scaling.gain,
        scaling.shift,
        summed,
        normed,
        hidden if scale is None else scale,
        rows,
        _step(gate),
        _step(scaling.gain),
        COLUMNS=columns,
        EPSILON=scaling.epsilon,
        LARGEST=FP8_MAX,
        SMALLEST_SCALE=SMALLEST_SCALE,
        HAS_ADDED=residual is not None,
        HAS_GATE=gate is not None,
        ADD_ONE=scaling.adds_one,
        QUANTIZE=quantize,
        FIRST=first,
        REST=rest,
        num_warps=_count_warps(rest),
    )
    return NormedBuffers(summed, normed, scale)


def _cut(columns: int) -> tuple[int, int]:
    """Two powers of two, the first below `columns`, which together cover them: 5,120 is 4,096 + 1,024."""
    first = next_power_of_two(columns) // 2
    return first, next_power_of_two(columns - first)


def _count_warps(rest: int) -> int:
    """As many as load the shorter part at once, 16 bytes of 16-bit numbers a thread: nothing moves between threads."""
    return max(1, min(_MOST_WARPS, rest // (_LOADED_TOGETHER * _WARP)))


def _step(vectors: torch.Tensor | None) -> int:
    """Values from one group's vector to the next; 0 where all groups share one."""
    return 0 if vectors is None or vectors.shape[0] == 1 else vectors.stride(0)


def _try_out(kernel: Any, device: torch.device, dtype: torch.dtype, variant: LayerNormVariant) -> None:  # noqa: ANN401
    # Three rows: Triton specialises on 1 and on multiples of 16.
    rows = torch.zeros((1, 3, variant.columns), device=device, dtype=dtype)
    vector = torch.zeros((1, variant.columns), device=device)
    residual = Residual(rows, vector if variant.has_gate else None) if variant.has_residual else None
    scaling = RowScaling(vector, vector, variant.adds_one, 1e-6)
    launch_layer_norm(kernel, rows, scaling, residual, quantize=variant.quantizes)


def _check(variant: LayerNormVariant) -> str | None:
    if not 2 <= variant.columns <= MOST_BLOCK_VALUES:
        return f"needs rows of 2 to {MOST_BLOCK_VALUES} values, this is {variant.columns}"
    return None


LAYER_NORM = Kernel(
    KernelName.LAYER_NORM,
    "layer_norm_triton.add_norm_quantize",
    _try_out,
    check_variant=_check,
)
