"""The formats that the benchmark compares, and how a layer is converted to each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import streamblocks_path  # noqa: F401
from full_size_models import ModelSize, ReplaceLinear, build_transformer_skeleton
from quantize_afterwards import quantize_layer
from torch import nn

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
    return lambda name, layer: quantize_layer(layer, spec, name=name).eval() if name in planned else layer
