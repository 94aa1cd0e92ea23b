"""Save a quantized Wan transformer as one safetensors file in the format of ComfyUI's own quantized checkpoints.

Wan's names, projections unfused, `comfy_format`'s keys, and the header fields `config` (by which ComfyUI recognises a
model of Wan 2.1 as causal and reads sizes that differ from the published ones) and `streamblocks` (diffusers' config
and how activations are quantized, which this pack reads).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
from torch import nn

from ...checkpoints.tensor_writing import PlannedTensor, write_tensors
from ...ops.fp8_linear import FP8Linear
from ...ops.int8 import Int8Linear
from ...ops.quantization import QuantizationSpec
from ..geometry import WAN_22_GEOMETRY
from ..transformer.joined_projections import fused_rows
from .original_names import original_name
from .single_file import HEAD_DIM, OWN_METADATA_KEY

_COMFY_FP8, _COMFY_INT8 = "float8_e4m3fn", "int8_tensorwise"
# Sizes of a Wan model that ComfyUI assumes, because it cannot read them from the shapes.
_COMFY_TEXT_DIM, _COMFY_FREQ_DIM = 4096, 256


@dataclass(frozen=True)
class _QuantizedLayer:
    """The tensors of a quantized layer of any class. `scale` is float32 [out, 1] or [1, 1]."""

    format: str
    data: torch.Tensor
    scale: torch.Tensor
    input_scale: torch.Tensor | None
    activations: str
    fast_accumulation: bool = True


def save_quantized_transformer(
    transformer: WanTransformer3DModel, path: Path, *, on_tensor: Callable[[str, int], None] | None = None
) -> Path:
    """Write `transformer`, as `load_transformer` made it, to `path`; only a complete file replaces an existing one.

    Tensors are written one by one from their device, without a second copy of the model. `on_tensor(name,
    nbytes)` is called after each.

    Raises:
        ValueError: no layer is quantized, the suffix is not .safetensors, or FP8 weights have a scale per row, which
            ComfyUI's float8_e4m3fn format cannot store.
        OSError: the file cannot be written.
    """
    if path.suffix != ".safetensors":
        raise ValueError(f"The file name {path.name!r} has no .safetensors suffix: give one that has.")
    layers = dict(_quantized_layers(transformer))
    if not layers:
        raise ValueError("The transformer has no quantized layer: quantize the pipeline before saving it as quantized.")
    tensors = list(_tensors(transformer, layers))
    write_tensors(path, tensors, file_metadata(dict(transformer.config), _spec(layers)), on_tensor)
    return path


def _quantized_layers(transformer: nn.Module) -> Iterator[tuple[str, _QuantizedLayer]]:
    for name, module in transformer.named_modules():
        if isinstance(module, FP8Linear):
            yield (
                name,
                _QuantizedLayer(
                    _COMFY_FP8,
                    module.weight,
                    module.weight_scale.view(-1, 1),
                    module.input_scale,
                    module.activations,
                    module.fast_accumulation,
                ),
            )
        elif isinstance(module, Int8Linear):
            scale = module.weight_scale.view(-1, 1)
            yield name, _QuantizedLayer(_COMFY_INT8, module.weight, scale, None, module.activations)


def _tensors(transformer: WanTransformer3DModel, layers: Mapping[str, _QuantizedLayer]) -> Iterator[PlannedTensor]:
    """Everything to write, under Wan's names. Row slices of fused tensors are views, so nothing is copied."""
    parts: dict[str, list[tuple[str, slice]]] = {}
    for part, (whole, rows) in _fused_parts(transformer).items():
        parts.setdefault(whole, []).append((part, rows))
    quantized_leaves = {f"{name}.{leaf}" for name in layers for leaf in ("weight", "weight_scale", "input_scale")}
    for name, tensor in transformer.state_dict(keep_vars=True).items():
        if name in quantized_leaves:
            continue
        for part, rows in parts.get(name, [(name, slice(None))]):
            yield PlannedTensor(original_name(part), tensor[rows] if name in parts else tensor)
    for name, layer in layers.items():
        for part, rows in parts.get(f"{name}.weight", [(f"{name}.weight", slice(0, layer.data.shape[0]))]):
            yield from _layer_tensors(original_name(part.removesuffix(".weight")), layer, rows)


def _layer_tensors(name: str, layer: _QuantizedLayer, rows: slice) -> Iterator[PlannedTensor]:
    """Weight, scales and mark of the rows of a quantized layer which Wan calls `name`."""
    yield PlannedTensor(f"{name}.weight", layer.data[rows])
    yield PlannedTensor(f"{name}.weight_scale", _stored_scale(name, layer, rows))
    if layer.input_scale is not None:
        yield PlannedTensor(f"{name}.input_scale", layer.input_scale.reshape(()))
    yield layer_mark(name, layer.format, full_precision=layer.format == _COMFY_FP8 and layer.activations == "none")


def layer_mark(name: str, format_: str, *, full_precision: bool) -> PlannedTensor:
    """The tensor that marks the layer `name` as quantized in `format_`, and how ComfyUI multiplies with it."""
    mark = {"format": format_, **({"full_precision_matrix_mult": True} if full_precision else {})}
    content = torch.tensor(list(json.dumps(mark).encode("utf-8")), dtype=torch.uint8)
    return PlannedTensor(f"{name}.comfy_quant", content)


def _stored_scale(name: str, layer: _QuantizedLayer, rows: slice) -> torch.Tensor:
    """The scale of some rows: [] where they share one, [rows, 1] for INT8 per row."""
    if layer.scale.shape[0] == 1:
        return layer.scale.reshape(())
    scale = layer.scale[rows]
    if layer.format == _COMFY_INT8:
        return scale
    # The layer was fused from projections with different scales: each projection has a single scale.
    if not bool((scale == scale[0]).all()):
        raise ValueError(
            f"{name} has FP8 weights with a scale per row, and ComfyUI's {_COMFY_FP8} format takes one per tensor: "
            "quantize with weight granularity 'per tensor' to save FP8, or choose INT8, which is saved per row."
        )
    return scale[0].reshape(())


def _fused_parts(transformer: WanTransformer3DModel) -> dict[str, tuple[str, slice]]:
    """`fused_rows` for a transformer whose projections are fused, for weights and biases only (not weight scales)."""
    if not all(getattr(block.attn1, "fused_projections", False) for block in transformer.blocks):
        return {}
    rows = fused_rows(transformer)
    return {part: whole for part, whole in rows.items() if part.endswith((".weight", ".bias"))}


def file_metadata(config: Mapping[str, Any], spec: QuantizationSpec | None) -> dict[str, str]:
    """The header fields of a file with a transformer of diffusers' `config`, quantized by `spec` or not at all."""
    config = {key: value for key, value in config.items() if not key.startswith("_")}
    own = {"config": config, **({"quantization": spec.as_dict()} if spec is not None else {})}
    return {
        "format": "pt",
        "config": json.dumps({"transformer": {**_causal_mark(config), **_unusual_sizes(config)}}),
        OWN_METADATA_KEY: json.dumps(own),
    }


def _spec(layers: Mapping[str, _QuantizedLayer]) -> QuantizationSpec:
    some = next(iter(layers.values()))
    return QuantizationSpec(
        "fp8" if some.format == _COMFY_FP8 else "int8",
        "per row" if any(layer.scale.shape[0] > 1 for layer in layers.values()) else "per tensor",
        some.activations,
        some.fast_accumulation,
    )


def _causal_mark(config: Mapping[str, Any]) -> dict[str, Any]:
    """What ComfyUI knows a causal model by; its class for the latents of Wan 2.2's 5B fails with the mark."""
    return {} if config["in_channels"] == WAN_22_GEOMETRY.channels else {"causal_ar": True}


def _unusual_sizes(config: Mapping[str, Any]) -> dict[str, Any]:
    """The sizes that ComfyUI would assume wrongly, as it cannot read them from the shapes; empty for Wan's models."""
    sizes: dict[str, Any] = {}
    if config["attention_head_dim"] != HEAD_DIM:
        sizes["num_heads"] = config["num_attention_heads"]
    if config["text_dim"] != _COMFY_TEXT_DIM:
        sizes["text_dim"] = config["text_dim"]
    if config["freq_dim"] != _COMFY_FREQ_DIM:
        sizes["freq_dim"] = config["freq_dim"]
    return sizes
