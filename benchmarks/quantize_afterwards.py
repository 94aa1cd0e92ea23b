"""Quantize layers that are loaded already: what quantizing while loading is compared with, and layers for tests."""

from __future__ import annotations

import torch
from torch import nn

from streamblocks.ops.fp8_linear import FP8Linear
from streamblocks.ops.quantization import QuantizationPlan, QuantizationSpec
from streamblocks.ops.weight_filling import FILLINGS, replace_layer, row_chunks


@torch.no_grad()
def quantize_layer(linear: nn.Linear, spec: QuantizationSpec, *, name: str = "the layer") -> nn.Module:
    """The quantized layer in place of `linear`; raises ValueError that names it for inf or NaN in its weight."""
    weight = linear.weight
    rows, columns = weight.shape
    filling = FILLINGS[spec.format](name, (rows, columns), spec, device=weight.device, dtype=weight.dtype)
    if filling.must_observe:
        for chunk in row_chunks(rows, columns):
            filling.observe(weight[chunk])
    for chunk in row_chunks(rows, columns):
        filling.write(chunk.start, weight[chunk])
    return filling.finish(linear)


def quantize_model(model: nn.Module, plan: QuantizationPlan) -> None:
    """Quantize the planned layers of a loaded `model` in place, one layer at a time."""
    assert plan.spec is not None
    for name in plan.quantized_names:
        linear = model.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        replace_layer(model, name, quantize_layer(linear, plan.spec, name=name))


def make_fp8_linear(
    weight: torch.Tensor, bias: torch.Tensor | None, spec: QuantizationSpec, *, name: str = "the layer"
) -> FP8Linear:
    """An `FP8Linear` of `weight` [out, in]; raises ValueError that names the layer for inf or NaN in it."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    linear.register_parameter("bias", None if bias is None else nn.Parameter(bias, requires_grad=False))
    layer = quantize_layer(linear, spec, name=name)
    assert isinstance(layer, FP8Linear)
    return layer
