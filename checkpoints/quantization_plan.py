"""From a checkpoint's headers to the plan of its quantization, and to the weights that are filled by it."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from ..ops.layer_presets import LayerPreset
from ..ops.quantization import PlannedLayer, QuantizationPlan, QuantizationSpec, plan_layers, quantized_bytes
from ..ops.weight_filling import FILLINGS, WeightFilling
from .checkpoint_files import CheckpointError, TensorHeader, TensorSource, read_headers
from .comfy_format import StoredWeight, read_single_scales
from .module_loading import destination_dtype

_PROJECTION = re.compile(r"(blocks\.\d+\.attn1)\.(to_q|to_k|to_v)\.(weight|bias)")
_STORED_FORMATS = {"float8_e4m3fn": "fp8", "int8_tensorwise": "int8"}
_STORED_REASON = "stored by the file in another format"


@dataclass(frozen=True)
class ComponentWeights:
    """What a component is made of.

    Attributes:
        path: folder or file, for messages.
        config: of the model class.
        sources: where each parameter is stored, under the model's names, self-attention unfused.
        stored: those among them that are stored quantized.
        spec: how this pack quantized the file, when it did.
    """

    path: Path
    config: Mapping[str, Any]
    sources: Mapping[str, TensorSource]
    stored: Mapping[str, StoredWeight] = field(default_factory=lambda: MappingProxyType({}))
    spec: QuantizationSpec | None = None

    @cached_property
    def single_scales(self) -> Mapping[str, float]:
        """The scale of each stored weight that has a single one."""
        return read_single_scales(self.stored)


def plan_component(
    weights: ComponentWeights,
    component: str,
    preset: LayerPreset | None,
    spec: QuantizationSpec | None,
    *,
    dtype: torch.dtype,
    keep_fp32: Collection[str] = (),
) -> QuantizationPlan:
    """What becomes of each layer when `weights` is loaded with `spec`, from headers only.

    Self-attention is planned fused (`to_qkv`), as it is loaded. Of a checkpoint which is quantized already the plan
    says what stays quantized; `plan.spec` is then how it is computed with.

    Raises:
        CheckpointError: `spec` asks to quantize a checkpoint that is quantized already.
        ValueError: a skip pattern matches nothing or everything.
    """
    if weights.stored and spec is not None and component in spec.components:
        format_ = next(iter(weights.stored.values())).format
        raise CheckpointError(
            f"{weights.path} is quantized already ({format_}): choose no quantization for it, or give the BF16, FP16 "
            "or FP32 file of the model."
        )
    headers = read_headers(weights.sources)
    shapes: dict[str, tuple[int, ...]] = {}
    itemsizes: dict[str, int] = {}
    other_bytes = 0
    for name, header in headers.items():
        itemsize = _itemsize(name, header, weights.stored, dtype, keep_fp32)
        layer = None if preset is None else _layer_of(name, header)
        if layer is None:
            other_bytes += header.elements * itemsize
            continue
        rows = shapes[layer][0] if layer in shapes else 0
        shapes[layer] = (rows + header.shape[0], *header.shape[1:])
        itemsizes[layer] = itemsize
    if weights.stored:
        return _stored_plan(weights, component, preset, shapes, itemsizes, other_bytes)
    return plan_layers(shapes, spec, component, preset, dtype=dtype, itemsizes=itemsizes, other_bytes=other_bytes)


def make_fillings(
    weights: ComponentWeights, plan: QuantizationPlan, *, device: torch.device | str, dtype: torch.dtype
) -> dict[str, WeightFilling]:
    """The weights to fill, by parameter name such as `blocks.0.attn1.to_qkv.weight`; memory is taken at first use.

    Raises CheckpointError for INT8 without torchao and unreadable scales.
    """
    if plan.spec is None:
        return {}
    spec = plan.spec
    fillings: dict[str, WeightFilling] = {}
    for layer in plan.layers:
        if layer.quantized:
            rows, columns = layer.shape
            fitted = replace(spec, weight_granularity=_granularity(weights, layer)) if weights.stored else spec
            filling = FILLINGS[spec.format](layer.name, (rows, columns), fitted, device=device, dtype=dtype)
            fillings[f"{layer.name}.weight"] = filling
    return fillings


def fused_name(name: str) -> str:
    """`name` of a parameter as it is after fusing: `to_q`, `to_k` and `to_v` of self-attention are `to_qkv`."""
    match = _PROJECTION.fullmatch(name)
    return f"{match[1]}.to_qkv.{match[3]}" if match else name


def _itemsize(
    name: str,
    header: TensorHeader,
    stored: Mapping[str, StoredWeight],
    dtype: torch.dtype,
    keep_fp32: Collection[str],
) -> int:
    # A weight that is stored in INT8 but not kept so becomes a floating-point one.
    kind = torch.float32 if name in stored else header.dtype
    return destination_dtype(name, kind, dtype, keep_fp32).itemsize


def _layer_of(name: str, header: TensorHeader) -> str | None:
    """The layer whose weight `name` is, as it is after fusing; None for biases, gains of norms and the like."""
    if name.endswith("scale_shift_table"):
        return name
    if not name.endswith(".weight") or len(header.shape) < 2:
        return None
    return fused_name(name).removesuffix(".weight")


def _stored_plan(
    weights: ComponentWeights,
    component: str,
    preset: LayerPreset | None,
    shapes: Mapping[str, tuple[int, ...]],
    itemsizes: Mapping[str, int],
    other_bytes: int,
) -> QuantizationPlan:
    """The plan of a checkpoint that is quantized already: a layer stays so when all of its parts are stored alike."""
    spec = weights.spec or _spec_of_others(weights.stored)
    parts: dict[str, list[str]] = {}
    for name in weights.sources:
        parts.setdefault(fused_name(name).removesuffix(".weight"), []).append(name)
    layers = []
    for planned in plan_layers(shapes, replace(spec, skip=()), component, preset, itemsizes=itemsizes).layers:
        formats = {weights.stored[name].format if name in weights.stored else "" for name in parts[planned.name]}
        alike = {_STORED_FORMATS.get(format_) for format_ in formats} == {spec.format}
        if planned.quantized and alike:
            granularity = _granularity(weights, planned)
            after = quantized_bytes(planned.shape, replace(spec, weight_granularity=granularity))
            layers.append(replace(planned, bytes_after=after))
        else:
            reason = planned.reason or ("not quantized in the file" if formats == {""} else _STORED_REASON)
            layers.append(replace(planned, reason=reason, bytes_after=planned.bytes_before))
    return QuantizationPlan(component, spec, tuple(layers), other_bytes)


def _spec_of_others(stored: Mapping[str, StoredWeight]) -> QuantizationSpec:
    """How to compute with a file which does not say so: as ComfyUI does.

    ComfyUI quantizes the input of INT8 layers per row, and that of FP8 layers with the stored scale or per tensor.
    """
    formats = [_STORED_FORMATS[weight.format] for weight in stored.values()]
    format_ = max(sorted(set(formats)), key=formats.count)
    weights = "per tensor"
    if any(weight.full_precision for weight in stored.values()):
        return QuantizationSpec(format_, weights, "none")
    if format_ == "int8":
        return QuantizationSpec(format_, weights, "dynamic per row")
    static = any(weight.input_scale is not None for weight in stored.values())
    return QuantizationSpec(format_, weights, "static" if static else "dynamic per tensor")


def _granularity(weights: ComponentWeights, layer: PlannedLayer) -> str:
    """ "per tensor" when one scale holds for the whole stored layer, else "per row".

    Projections fused here are stored with a scale each: where those differ, every row gets that of its projection.
    """
    scales = {weights.single_scales.get(name) for name in _part_names(layer.name)}
    return "per tensor" if len(scales) == 1 and None not in scales else "per row"


def _part_names(layer: str) -> list[str]:
    if not layer.endswith("attn1.to_qkv"):
        return [f"{layer}.weight"]
    prefix = layer.removesuffix("to_qkv")
    return [f"{prefix}{part}.weight" for part in ("to_q", "to_k", "to_v")]
