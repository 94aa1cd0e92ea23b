"""From a checkpoint's headers to the plan of its quantization, and to the weights that are filled according to it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from ..ops.layer_presets import LayerPreset
from ..ops.quantization import PlannedLayer, QuantizationPlan, QuantizationSpec, plan_layers, quantized_bytes
from ..ops.weight_filling import FILLINGS, WeightFilling
from .checkpoint_files import CheckpointError
from .lora_choice import LoraMatch
from .lora_rows import stored_quantized
from .module_loading import destination_dtype
from .row_sources import QuantizedRows, RowSource, elements, read_scale

_STORED_FORMATS = {"float8_e4m3fn": "fp8", "int8_tensorwise": "int8"}
_STORED_REASON = "stored by the file in another format"
_CHANGED_NOTE = "stored quantized, changed by a LoRA, quantized again"


def same_name(name: str) -> str:
    """For components in which no layers are joined."""
    return name


@dataclass(frozen=True)
class ComponentWeights:
    """The stored weights of a component.

    Attributes:
        path: folder or file, for messages.
        config: of the model class.
        sources: where each parameter comes from, under the model's names, before layers are joined.
        spec: how this pack quantized the file; None if it did not.
        joined_name: from a parameter's name to that of the parameter that it is joined into; the same name for most.
        loras: what of each LoRA is on the sources.
    """

    path: Path
    config: Mapping[str, Any]
    sources: Mapping[str, RowSource]
    spec: QuantizationSpec | None = None
    joined_name: Callable[[str], str] = same_name
    loras: tuple[LoraMatch, ...] = ()

    @cached_property
    def stored(self) -> Mapping[str, QuantizedRows]:
        """The weights that are stored quantized, those that a LoRA changes among them."""
        stored = {name: stored_quantized(source) for name, source in self.sources.items()}
        return {name: rows for name, rows in stored.items() if rows is not None}

    @cached_property
    def requantized(self) -> frozenset[str]:
        """Those of `stored` that a LoRA changes: their rows are dequantized, changed and quantized again."""
        return frozenset(name for name, rows in self.stored.items() if self.sources[name] is not rows)

    @cached_property
    def parts(self) -> Mapping[str, tuple[str, ...]]:
        """The weights that each layer is joined from, by the layer's name."""
        parts: dict[str, list[str]] = {}
        for name in self.sources:
            layer = self.joined_name(name).removesuffix(".weight")
            parts.setdefault(layer, []).append(name)
        return {layer: tuple(names) for layer, names in parts.items()}

    @cached_property
    def single_scales(self) -> Mapping[str, float]:
        """The scale of each weight that has a single one and is taken as it is stored."""
        kept = {name: rows for name, rows in self.stored.items() if name not in self.requantized}
        single = {name: rows.scale for name, rows in kept.items() if elements(rows.scale) == 1}
        return {name: float(read_scale(scale, "cpu")) for name, scale in single.items()}


def plan_component(
    weights: ComponentWeights,
    component: str,
    preset: LayerPreset | None,
    spec: QuantizationSpec | None,
    *,
    dtype: torch.dtype,
    keep_fp32: Collection[str] = (),
) -> QuantizationPlan:
    """How each layer is loaded from `weights` with `spec`, from headers only.

    Layers are planned as joined, as they are loaded. For a checkpoint that is already quantized the plan says what
    stays quantized; `plan.spec` then says how to compute with it.

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
    shapes: dict[str, tuple[int, ...]] = {}
    itemsizes: dict[str, int] = {}
    other_bytes = 0
    for name, source in weights.sources.items():
        # A weight stored in INT8 but not kept in it is dequantized to floating point, the dtype in `source.dtype`.
        itemsize = destination_dtype(name, source.dtype, dtype, keep_fp32).itemsize
        layer = None if preset is None else _layer_of(weights.joined_name(name), source)
        if layer is None:
            other_bytes += elements(source) * itemsize
            continue
        rows = shapes[layer][0] if layer in shapes else 0
        shapes[layer] = (rows + source.shape[0], *source.shape[1:])
        itemsizes[layer] = itemsize
    if weights.stored:
        return _stored_plan(weights, component, preset, shapes, itemsizes, other_bytes)
    return plan_layers(shapes, spec, component, preset, dtype=dtype, itemsizes=itemsizes, other_bytes=other_bytes)


def make_fillings(
    weights: ComponentWeights,
    plan: QuantizationPlan,
    *,
    device: torch.device,
    dtype: torch.dtype,
    home_of: Callable[[str], torch.device],
) -> dict[str, WeightFilling]:
    """The weights to fill, by parameter name such as `blocks.0.attn1.to_qkv.weight`; memory is allocated at first use.

    Args:
        weights: of the component.
        plan: which layers are quantized, and how.
        device: where they are quantized.
        dtype: of the component.
        home_of: where a parameter lies.

    Raises CheckpointError for unreadable scales.
    """
    if plan.spec is None:
        return {}
    spec = plan.spec
    fillings: dict[str, WeightFilling] = {}
    for layer in plan.layers:
        if layer.quantized:
            rows, columns = layer.shape
            fitted = replace(spec, weight_granularity=_granularity(weights, layer, spec)) if weights.stored else spec
            name = f"{layer.name}.weight"
            fillings[name] = FILLINGS[spec.format](
                layer.name, (rows, columns), fitted, device=device, dtype=dtype, home=home_of(name)
            )
    return fillings


def _layer_of(name: str, source: RowSource) -> str | None:
    """The layer whose weight `name` is; None for biases, gains of norms and the like."""
    if name.endswith("scale_shift_table"):
        return name
    if not name.endswith(".weight") or len(source.shape) < 2:
        return None
    return name.removesuffix(".weight")


def _stored_plan(
    weights: ComponentWeights,
    component: str,
    preset: LayerPreset | None,
    shapes: Mapping[str, tuple[int, ...]],
    itemsizes: Mapping[str, int],
    other_bytes: int,
) -> QuantizationPlan:
    """The plan of a checkpoint that is already quantized: a layer stays quantized if all its parts have one format."""
    spec = replace(weights.spec or _spec_of_others(weights.stored), components=(component,))
    layers = []
    for planned in plan_layers(shapes, replace(spec, skip=()), component, preset, itemsizes=itemsizes).layers:
        names = weights.parts[planned.name]
        formats = {weights.stored[name].format if name in weights.stored else "" for name in names}
        alike = {_STORED_FORMATS.get(format_) for format_ in formats} == {spec.format}
        if planned.quantized and alike:
            granularity = _granularity(weights, planned, spec)
            after = quantized_bytes(planned.shape, replace(spec, weight_granularity=granularity))
            note = "" if weights.requantized.isdisjoint(names) else _CHANGED_NOTE
            layers.append(replace(planned, bytes_after=after, note=note))
        else:
            reason = planned.reason or ("not quantized in the file" if formats == {""} else _STORED_REASON)
            layers.append(replace(planned, reason=reason, bytes_after=planned.bytes_before))
    return QuantizationPlan(component, spec, tuple(layers), other_bytes)


def _spec_of_others(stored: Mapping[str, QuantizedRows]) -> QuantizationSpec:
    """How to compute with a file that does not specify it: as ComfyUI does.

    ComfyUI quantizes the input of INT8 layers per row, and of FP8 layers with the stored scale or per tensor.
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


def _granularity(weights: ComponentWeights, layer: PlannedLayer, spec: QuantizationSpec) -> str:
    """ "per tensor" when one scale holds for the whole stored layer, else "per row".

    Layers joined here are stored with a scale each: where those differ, every row gets that of its part. A layer
    which is quantized again as a whole is so as `spec` says.
    """
    names = weights.parts[layer.name]
    if weights.requantized.issuperset(names):
        return spec.weight_granularity
    scales = {weights.single_scales.get(name) for name in names}
    return "per tensor" if len(scales) == 1 and None not in scales else "per row"
