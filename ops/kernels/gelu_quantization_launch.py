"""The kernel of `fp8_linear`: GELU and row-wise FP8 quantization in one pass."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from .kernel import MOST_BLOCK_VALUES, Kernel, KernelName, launch, next_power_of_two

FP8_DTYPE = torch.float8_e4m3fn
FP8_MAX = torch.finfo(FP8_DTYPE).max
# A smaller scale would be denormal, which a GPU may treat as 0 in a division. Rows of zeros get this scale too.
SMALLEST_SCALE = torch.finfo(torch.float32).tiny


class GeluVariant(NamedTuple):
    """What the kernel is compiled for."""

    columns: int


def launch_gelu_quantization(kernel: Any, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:  # noqa: ANN401
    """GELU (tanh approximation) of `rows`, quantized row by row.

    Args:
        kernel: of `GELU_QUANTIZATION.load`.
        rows: [rows, columns] of any float dtype, contiguous.

    Returns:
        float8_e4m3fn [rows, columns] and its scale, float32 [rows, 1].
    """
    count, columns = rows.shape
    quantized = torch.empty(rows.shape, dtype=FP8_DTYPE, device=rows.device)
    scale = torch.empty((count, 1), dtype=torch.float32, device=rows.device)
    launch(
        kernel,
        (count,),
        rows.device,
        rows,
        quantized,
        scale,
        columns,
        LARGEST=FP8_MAX,
        SMALLEST_SCALE=SMALLEST_SCALE,
        BLOCK=next_power_of_two(columns),
        num_warps=8,
    )
    return quantized, scale


def _try_out(kernel: Any, device: torch.device, dtype: torch.dtype, variant: GeluVariant) -> None:  # noqa: ANN401
    launch_gelu_quantization(kernel, torch.zeros((1, variant.columns), device=device, dtype=dtype))


def _check(variant: GeluVariant) -> str | None:
    if variant.columns > MOST_BLOCK_VALUES:
        return f"needs rows of at most {MOST_BLOCK_VALUES} values, this is {variant.columns}"
    return None


GELU_QUANTIZATION = Kernel(
    KernelName.GELU_QUANTIZATION,
    "gelu_quantization_triton.gelu_quantize_rows",
    _try_out,
    # The lowest with FP8 conversions.
    first_capability=(8, 9),
    check_variant=_check,
)
