"""torchao's INT8 linear layers: weight-only, and W8A8 with dynamic activations.

torchao is imported inside the functions: it takes seconds and only INT8 needs it.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import nn

from .quantization import QuantizationSpec


def require_torchao() -> ModuleType:
    """The module `torchao.quantization`; raises ValueError with what to install where it is missing."""
    try:
        import torchao.quantization as torchao_quantization
    except ImportError as error:
        raise ValueError(
            f"INT8 needs torchao, which cannot be imported here ({error}): run `pip install torchao`, or choose fp8."
        ) from error
    return torchao_quantization


def int8_config(spec: QuantizationSpec) -> Any:  # noqa: ANN401
    """torchao's config of `spec`; raises ValueError when it is not INT8 or torchao is missing."""
    if spec.format != "int8":
        raise ValueError(f"format is {spec.format!r}: torchao's INT8 takes 'int8'.")
    torchao = require_torchao()
    weights = torchao.PerRow() if spec.weight_granularity == "per row" else torchao.PerTensor()
    # By default torchao changes inductor's settings for the whole process.
    if spec.activations == "none":
        return torchao.Int8WeightOnlyConfig(granularity=weights, set_inductor_config=False)
    inputs = torchao.PerRow() if spec.activations == "dynamic per row" else torchao.PerTensor()
    return torchao.Int8DynamicActivationInt8WeightConfig(granularity=[inputs, weights], set_inductor_config=False)


def is_int8(weight: object) -> bool:
    """Whether `weight` is a torchao INT8 tensor, without importing torchao."""
    return type(weight).__name__ == "Int8Tensor" and type(weight).__module__.startswith("torchao")


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
    """
    torchao = require_torchao()
    if scale is None:
        weight: Any = _quantized_linear(values, spec).weight
    else:
        int8_tensor = _int8_tensor_class()
        weight = int8_tensor.from_hp(values, granularity=torchao.PerTensor(), scale=scale)
    return weight.qdata, weight.scale


def int8_tensor_scale(magnitude: torch.Tensor, spec: QuantizationSpec, dtype: torch.dtype) -> torch.Tensor:
    """torchao's scale, float32 [1, 1], of a weight of `dtype` whose largest magnitude is `magnitude` [1, 1]."""
    weight: Any = _quantized_linear(magnitude.to(dtype), spec).weight
    return weight.scale.reshape(1, 1)


def int8_parameter(data: torch.Tensor, scale: torch.Tensor, spec: QuantizationSpec, dtype: torch.dtype) -> nn.Parameter:
    """The weight of an `nn.Linear` from quantized data.

    Args:
        data: int8 [out, in].
        scale: float32 [out, 1] or [1, 1].
        spec: INT8, for how activations are quantized.
        dtype: logical dtype of the weight, in which it computes.
    """
    template: Any = _quantized_linear(torch.ones((1, 8), dtype=dtype, device=data.device), spec).weight
    block = [1 if scale.shape[0] > 1 else data.shape[0], data.shape[1]]
    zero_point = torch.zeros(scale.shape, dtype=torch.int8, device=data.device)
    tensor = _int8_tensor_class()(
        data, scale, block, dtype, zero_point=zero_point, act_quant_kwargs=template.act_quant_kwargs
    )
    return nn.Parameter(tensor, requires_grad=False)


def _quantized_linear(values: torch.Tensor, spec: QuantizationSpec) -> nn.Linear:
    """A layer of just these rows after `quantize_`."""
    linear = nn.Linear(values.shape[1], values.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(values, requires_grad=False)
    require_torchao().quantize_(linear, int8_config(spec))
    _break_cycle(linear)
    return linear


def _break_cycle(linear: nn.Module) -> None:
    """Remove the `extra_repr` that torchao binds to the layer: this cycle keeps weights until a garbage collection."""
    linear.__dict__.pop("extra_repr", None)


def _int8_tensor_class() -> Any:  # noqa: ANN401
    from torchao.quantization import Int8Tensor

    return Int8Tensor
