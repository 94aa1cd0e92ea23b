"""A linear layer with float8_e4m3fn weights: `torch._scaled_mm` on FP8 units, dequantize-then-matmul elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.nn import functional as F

from .kernels.gelu_quantization_launch import (
    FP8_DTYPE,
    FP8_MAX,
    GELU_QUANTIZATION,
    SMALLEST_SCALE,
    GeluVariant,
    launch_gelu_quantization,
)
from .quantized_linear import QuantizedLinear

FIRST_CAPABILITY = (8, 9)


def supports_fp8_matmul(device: torch.device | str) -> bool:
    """Whether `torch._scaled_mm` runs on FP8 units of `device`: CUDA of compute capability 8.9 (Ada) or more."""
    device = torch.device(device)
    if device.type != "cuda" or torch.version.cuda is None or not torch.cuda.is_available():
        return False
    return torch.cuda.get_device_capability(device) >= FIRST_CAPABILITY


def fp8_notice(device: torch.device | str) -> str:
    """One sentence for the user when FP8 saves memory but no time on `device`; empty when it saves both."""
    if supports_fp8_matmul(device):
        return ""
    return f"{device} has no FP8 units: FP8 saves memory there but no time, because weights are dequantized for use."


def largest_magnitude(values: torch.Tensor, granularity: str) -> torch.Tensor:
    """max |values| in float32, [rows, 1] "per row" or [1, 1] "per tensor", in one pass without a copy of `values`."""
    dim = -1 if granularity == "per row" else (0, 1)
    return torch.linalg.vector_norm(values, ord=float("inf"), dim=dim, keepdim=True, dtype=torch.float32)


def fp8_scale(magnitude: torch.Tensor) -> torch.Tensor:
    """The scale that maps `magnitude` onto 448, the largest e4m3fn number; computed in place."""
    return magnitude.div_(FP8_MAX).clamp_(min=SMALLEST_SCALE)


def check_finite(magnitude: torch.Tensor, name: str) -> None:
    """Raise ValueError that names the layer when a largest magnitude is inf or NaN."""
    if not bool(torch.isfinite(magnitude).all()):
        raise ValueError(
            f"The weight of {name} holds inf or NaN, which cannot be quantized: give another checkpoint, or skip the "
            "layer."
        )


def round_to_fp8(values: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """`values` / `scale`, clamped to e4m3fn's range and rounded to nearest even."""
    return values.to(torch.float32, copy=True).div_(scale).clamp_(-FP8_MAX, FP8_MAX).to(FP8_DTYPE)


class QuantizedRows(NamedTuple):
    """An input of `FP8Linear` that is quantized already, with a scale per row.

    Attributes:
        quantized: float8_e4m3fn [..., in_features].
        scale: float32 [rows, 1].
        dtype: of the rows before, and of the output.
    """

    quantized: torch.Tensor
    scale: torch.Tensor
    dtype: torch.dtype


class FP8Linear(QuantizedLinear):
    """y = x W^T + b with W in float8_e4m3fn.

    On FP8 units the input is quantized too, as `activations` says, unless that is "none"; elsewhere each
    forward dequantizes the weight temporarily. The choice is made when weights are placed or moved, never in a
    forward. On FP8 units one forward allocates the quantized input, its scale where it is dynamic,
    and the output.

    Attributes:
        weight: float8_e4m3fn [out_features, in_features], not trainable.
        weight_scale: float32, [1, out_features] (per row) or [1, 1] (per tensor).
        input_scale: float32 [1, 1] for calibrated static quantization, or None. Without it "static" works as
            "dynamic per tensor".
        bias: [out_features] or None.
        activations: one of `quantization.ACTIVATIONS`.
        fast_accumulation: see `QuantizationSpec`.
        gelu_kernel: applies GELU to the input while quantizing it; None if the input is used unchanged. See
            `take_gelu`.
    """

    input_scale: torch.Tensor | None
    kernel_scale: torch.Tensor

    def __init__(
        self,
        weight: torch.Tensor,
        weight_scale: torch.Tensor,
        bias: torch.Tensor | None,
        *,
        activations: str,
        fast_accumulation: bool = True,
        input_scale: torch.Tensor | None = None,
    ) -> None:
        super().__init__(weight, weight_scale, bias, activations)
        self.fast_accumulation = fast_accumulation
        self.gelu_kernel: Any = None
        self.register_buffer("input_scale", input_scale)
        self.register_buffer("kernel_scale", None, persistent=False)
        self.decide_compute()

    def take_gelu(self) -> bool:
        """Apply GELU (tanh approximation) to the input from now on, if the kernel can do so while quantizing.

        This takes one pass over the input; GELU, the largest magnitude of each row and the quotient would take three.
        Only on FP8 units, with a scale per row and where the kernel `GELU_QUANTIZATION` runs; returns whether the
        layer applies GELU.
        """
        if self._scaled and self._row_wise:
            dtype = torch.bfloat16 if self.bias is None else self.bias.dtype
            self.gelu_kernel = GELU_QUANTIZATION.load(self.weight.device, dtype, GeluVariant(self.in_features))
        return self.gelu_kernel is not None

    def decide_compute(self) -> None:
        """Choose kernel and scales for the device that the weights are on. Called when they are placed or moved."""
        device = self.weight.device
        self._scaled = self.activations != "none" and supports_fp8_matmul(device)
        per_row_weight = self.weight_scale.numel() > 1
        self._row_wise = self.activations == "dynamic per row"
        # The kernel takes either one scale on both sides or a scale per row on both sides. For weights per row and one
        # scale for the input, the kernel runs with weight scale 1 and the output is scaled per row afterwards.
        self._rescale = per_row_weight and not self._row_wise
        self._saturate = self.activations == "static" and self._scaled and not _cast_saturates(device)
        if self._rescale:
            self.kernel_scale = torch.ones((1, 1), dtype=torch.float32, device=device)
        elif self._row_wise:
            self.kernel_scale = self.weight_scale.expand(1, self.out_features).contiguous()
        else:
            self.kernel_scale = self.weight_scale

    def takes_rows(self) -> bool:
        """Whether `forward` takes `QuantizedRows`: on FP8 units, with a scale per row and without a GELU before it."""
        return self._scaled and self._row_wise and self.gelu_kernel is None

    def forward(self, x: torch.Tensor | QuantizedRows) -> torch.Tensor:
        """[..., in_features] of any float dtype to [..., out_features] of the same dtype; see `takes_rows`."""
        if isinstance(x, QuantizedRows):
            rows = x.quantized.reshape(-1, self.in_features)
            made = self._multiply(rows, x.scale, x.dtype)
            return made.view(*x.quantized.shape[:-1], self.out_features)
        if not self._scaled:
            x = x if self.gelu_kernel is None else F.gelu(x, approximate="tanh")
            return F.linear(x, self.dequantized_weight(x.dtype), self.bias)
        shape = (*x.shape[:-1], self.out_features)
        rows = x.reshape(-1, self.in_features)
        if rows.shape[0] == 0:
            return x.new_empty(shape)
        return self._matmul(rows).view(shape)

    def scale_of_input(self, rows: torch.Tensor) -> torch.Tensor:
        """The scale by which `rows` [rows, in_features] are quantized on FP8 units: float32 [rows, 1] or [1, 1]."""
        if self.activations == "static" and self.input_scale is not None:
            return self.input_scale
        return fp8_scale(largest_magnitude(rows, "per row" if self._row_wise else "per tensor"))

    def _matmul(self, rows: torch.Tensor) -> torch.Tensor:
        """[rows, in_features] to [rows, out_features] on FP8 units."""
        return self._multiply(*self._quantize_input(rows), rows.dtype)

    def _multiply(self, quantized: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Quantized rows to [rows, out_features] of `dtype`."""
        # Row-wise scaling exists only in bfloat16, and rescaled rows stay in range only in bfloat16.
        wide = self._row_wise or self._rescale or dtype == torch.float32
        out_dtype = torch.bfloat16 if wide else dtype
        fused_bias = self.bias is not None and self.bias.dtype == out_dtype and not self._rescale
        out = torch._scaled_mm(
            quantized,
            self.weight.t(),
            scale_a=scale,
            scale_b=self.kernel_scale,
            bias=self.bias if fused_bias else None,
            out_dtype=out_dtype,
            use_fast_accum=self.fast_accumulation,
        )
        if self._rescale:
            out.mul_(self.weight_scale)
        if self.bias is not None and not fused_bias:
            out.add_(self.bias)
        return out.to(dtype)

    def _quantize_input(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """[rows, in_features] as float8_e4m3fn with its scale, float32 [rows, 1] or [1, 1]."""
        if self.gelu_kernel is not None:
            return launch_gelu_quantization(self.gelu_kernel, rows)
        scale = self.scale_of_input(rows)
        quantized = torch.empty(rows.shape, dtype=FP8_DTYPE, device=rows.device)
        # Divide directly into FP8: a float32 quotient would be four times as large. A dynamic scale keeps it within
        # 448; with a static scale it must be clamped.
        torch.div(rows, scale, out=quantized)
        if self._saturate:
            _saturate(quantized)
        return quantized, scale

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> FP8Linear:
        # Decided anew where the layer comes to lie.
        self.kernel_scale = self.weight_scale
        super()._apply(fn, recurse)
        return self


def _cast_saturates(device: torch.device) -> bool:
    """Whether a cast to e4m3fn on `device` clamps, as in newer torch; otherwise numbers beyond 448 become NaN."""
    return not bool(torch.full((1,), 2 * FP8_MAX, device=device).to(FP8_DTYPE).isnan().item())


def _saturate(quantized: torch.Tensor) -> None:
    """Replace e4m3fn's two NaNs, which an overflowing cast makes, by +448 and -448, in place.

    Their bytes are 0x7F and 0xFF, and those of +448 and -448 are one less: a clamp at 126 as signed numbers replaces
    the first, a clamp at 254 as unsigned numbers the second.
    """
    quantized.view(torch.int8).clamp_(max=126)
    quantized.view(torch.uint8).clamp_(max=254)
