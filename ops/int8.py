"""A linear layer with INT8 weights: torchao quantizes them, `torch._int_mm` multiplies where the device has it.

torchao is imported inside the functions: it takes seconds and only quantizing to INT8 needs it.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from .fp8_linear import largest_magnitude
from .kernels.gelu_quantization_launch import SMALLEST_SCALE
from .quantization import QuantizationSpec
from .quantized_linear import QuantizedLinear

INT8_MAX = 127.0
# The first with INT8 tensor cores: Turing.
FIRST_CAPABILITY = (7, 5)
# torch._int_mm on CUDA refuses 16 rows and fewer.
_FEWEST_ROWS = 32


def require_torchao() -> ModuleType:
    """The module `torchao.quantization`; raises ValueError with what to install where it is missing."""
    try:
        import torchao.quantization as torchao_quantization
    except ImportError as error:
        raise ValueError(
            f"INT8 needs torchao, which cannot be imported here ({error}): run `pip install torchao`, or choose fp8."
        ) from error
    return torchao_quantization


def quantize_int8_rows(
    values: torch.Tensor, spec: QuantizationSpec, scale: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize some rows of a weight with torchao.

    Args:
        values: [rows, in], any float dtype.
        spec: INT8.
        scale: float32 [1, 1] for weights per tensor; None per row.

    Returns:
        int8 [rows, in], and the scale: float32 [rows, 1], or `scale`.

    Raises ValueError where torchao is missing.
    """
    torchao = require_torchao()
    if scale is None:
        weight = _quantized_weight(values, spec)
    else:
        weight = torchao.Int8Tensor.from_hp(values, granularity=torchao.PerTensor(), scale=scale)
    return weight.qdata, weight.scale


def int8_tensor_scale(magnitude: torch.Tensor, spec: QuantizationSpec, dtype: torch.dtype) -> torch.Tensor:
    """torchao's scale, float32 [1, 1], of a weight of `dtype` whose largest magnitude is `magnitude` [1, 1]."""
    scale: torch.Tensor = _quantized_weight(magnitude.to(dtype), spec).scale
    return scale.reshape(1, 1)


def _quantized_weight(values: torch.Tensor, spec: QuantizationSpec) -> Any:  # noqa: ANN401
    """torchao's `Int8Tensor` of just these rows. Its weights do not depend on how inputs are quantized."""
    torchao = require_torchao()
    granularity = torchao.PerRow() if spec.weight_granularity == "per row" else torchao.PerTensor()
    linear = nn.Linear(values.shape[1], values.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(values, requires_grad=False)
    # By default torchao changes inductor's settings for the whole process.
    torchao.quantize_(linear, torchao.Int8WeightOnlyConfig(granularity=granularity, set_inductor_config=False))
    # torchao binds its own to the layer, and this cycle would keep the weight until a garbage collection.
    linear.__dict__.pop("extra_repr", None)
    return linear.weight


def supports_int8_matmul(device: torch.device | str) -> bool:
    """Whether `torch._int_mm` runs on `device`: a CPU, or CUDA of compute capability 7.5 (Turing) or more."""
    device = torch.device(device)
    if device.type == "cuda":
        # ROCm's devices are called "cuda", too, and not all of them have the product.
        is_cuda = torch.version.cuda is not None and torch.cuda.is_available()
        return is_cuda and torch.cuda.get_device_capability(device) >= FIRST_CAPABILITY
    # Nothing runs on the meta device, where a stream's memory is rehearsed.
    return device.type in ("cpu", "meta")


def int8_scale(magnitude: torch.Tensor) -> torch.Tensor:
    """The scale of inputs, which maps `magnitude` onto 127, so that no number has to be clamped; computed in place."""
    return magnitude.div_(INT8_MAX).clamp_(min=SMALLEST_SCALE)


def round_to_int8(values: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """`values` / `scale` rounded to nearest even; one float32 temporary."""
    return torch.div(values, scale).round_().to(torch.int8)


class Int8Linear(QuantizedLinear):
    """y = x W^T + b with W in INT8.

    With `activations` other than "none" the input is quantized too and the product is one of integers, exact in
    int32. With "none", and where the device has no such product, each forward casts the integers temporarily.
    The choice is made when weights are placed or moved, never in a forward.

    The weights are torchao's numbers, the layer is not torchao's: outside of traced code its product formats the input
    as text, to find out whether it is traced, for which the host waits 48 times (torchao 0.18, `safe_int_mm`), and its
    weights are a tensor subclass, which every call of a compiled layer takes apart.

    Attributes:
        weight: int8 [out_features, in_features], not trainable.
        weight_scale: float32, [1, out_features] (per row) or [1, 1] (per tensor).
        bias: [out_features] or None.
        activations: one of `quantization.ACTIVATIONS` without "static".
    """

    def __init__(
        self, weight: torch.Tensor, weight_scale: torch.Tensor, bias: torch.Tensor | None, *, activations: str
    ) -> None:
        super().__init__(weight, weight_scale, bias, activations)
        self.decide_compute()

    def decide_compute(self) -> None:
        """Choose the product for the device that the weights are on. Called when they are placed or moved."""
        self._integer = self.activations != "none" and supports_int8_matmul(self.weight.device)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., in_features] of any float dtype to [..., out_features] of the same dtype."""
        shape = (*x.shape[:-1], self.out_features)
        rows = x.reshape(-1, self.in_features)
        if not self._integer:
            return self._float_matmul(rows).view(shape)
        return x.new_empty(shape) if rows.shape[0] == 0 else self._matmul(rows).view(shape)

    def _float_matmul(self, rows: torch.Tensor) -> torch.Tensor:
        """The same with rows that are not quantized; but for traced code torchao's weight-only layer, to the bit."""
        if rows.dtype == torch.float16:
            # Sums of integers, not scaled yet, would overflow.
            return F.linear(rows, self.dequantized_weight(rows.dtype), self.bias)
        product = torch.mm(rows, self.weight.t().to(rows.dtype))
        if torch.compiler.is_compiling():
            # The same order in bfloat16 is a pattern for which inductor writes a product of its own, and fails to
            # (`woq_int8`, torch 2.11 on CUDA). One kernel scales and adds; float32 costs it nothing.
            scaled = product.float() * self.weight_scale
            return (scaled if self.bias is None else scaled + self.bias).to(rows.dtype)
        product.mul_(self.weight_scale.to(rows.dtype))
        return product if self.bias is None else product.add_(self.bias)

    def _matmul(self, rows: torch.Tensor) -> torch.Tensor:
        """[rows, in_features] to [rows, out_features] through integers."""
        # NaN and inf are not lost in the integers: the scale of their row is not finite.
        scale = int8_scale(
            largest_magnitude(rows, "per row" if self.activations == "dynamic per row" else "per tensor")
        )
        quantized = round_to_int8(rows, scale)
        count = quantized.shape[0]
        if count < _FEWEST_ROWS:
            quantized = F.pad(quantized, (0, 0, 0, _FEWEST_ROWS - count))
        # In float32 until the end: a sum times one of its two scales would overflow float16.
        product = torch._int_mm(quantized, self.weight.t())[:count] * scale
        product.mul_(self.weight_scale)
        if self.bias is not None:
            product.add_(self.bias)
        return product.to(rows.dtype)
