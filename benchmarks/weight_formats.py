"""The formats that the benchmark compares, and how a layer gets into each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import streamblocks_path  # noqa: F401
import torch
from full_size_models import ModelSize, ReplaceLinear, build_transformer_skeleton
from torch import nn

from streamblocks.ops.fp8_linear import FP8Linear
from streamblocks.ops.int8 import int8_parameter, quantize_int8_rows
from streamblocks.ops.quantization import QuantizationSpec, plan_layers
from streamblocks.wan.checkpoints.layer_presets import PRESETS

PLAIN = "bf16"
# Name on the command line to the fields of a QuantizationSpec.
SPECS: Mapping[str, Mapping[str, Any]] = {
    "fp8": {"format": "fp8"},
    "fp8-slow": {"format": "fp8", "fast_accumulation": False},
    "fp8-tensor": {
        "format": "fp8",
        "weight_granularity": "per tensor",
        "activations": "dynamic per tensor",
    },
    "fp8-weight": {"format": "fp8", "activations": "none"},
    "int8": {"format": "int8"},
    "int8-weight": {"format": "int8", "activations": "none"},
}
FORMATS = (PLAIN, *SPECS)


def matrix_of(weight_format: str) -> str:
    """The operands of the matrix product in this format: "bf16", "fp8" or "int8"."""
    fields = SPECS.get(weight_format, {"activations": "none"})
    return "bf16" if fields.get("activations") == "none" else fields["format"]


def layer_replacement(weight_format: str, size: ModelSize) -> ReplaceLinear | None:
    """What turns a filled linear layer into one of this format; None where layers stay as they are."""
    if weight_format == PLAIN:
        return None
    spec = QuantizationSpec(**SPECS[weight_format])
    skeleton = build_transformer_skeleton(size)
    layers = {name: layer for name, layer in skeleton.named_modules() if isinstance(layer, nn.Linear)}
    shapes = {name: tuple(layer.weight.shape) for name, layer in layers.items()}
    planned = frozenset(plan_layers(shapes, spec, "transformer", PRESETS["transformer"]).quantized_names)
    return lambda name, layer: _quantized(name, layer, spec) if name in planned else layer


@torch.no_grad()
def _quantized(name: str, layer: nn.Linear, spec: QuantizationSpec) -> nn.Module:
    if spec.format == "fp8":
        return FP8Linear.from_float(layer.weight, layer.bias, spec, name=name).eval()
    dtype = layer.weight.dtype
    data, scale = quantize_int8_rows(layer.weight.data, spec, None)
    layer.weight = int8_parameter(data, scale, spec, dtype)
    return layer
