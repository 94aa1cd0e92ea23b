"""What is quantized and how: the specification, the layer presets of each component, and the plan made from both.

Everything here works on names and shapes, so a plan exists before a single weight is read.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from types import MappingProxyType
from typing import Any

import torch

from .layer_presets import LayerPreset

FORMATS = ("fp8", "int8")
WEIGHT_GRANULARITIES = ("per row", "per tensor")
ACTIVATIONS = ("dynamic per row", "dynamic per tensor", "static", "none")
QUANTIZABLE_COMPONENTS = ("transformer", "text_encoder")
# What torch._scaled_mm requires of in and out features; torch._int_mm requires 8.
KERNEL_MULTIPLE = 16
# Of all patterns that a user writes.
_MOST_LETTERS, _SHOWN_LETTERS = 10_000, 80
NO_ITEMSIZES: Mapping[str, int] = MappingProxyType({})

_VAE_REASON = "its convolutions decide what every pixel looks like, and it is under 1 % of the weights"


@dataclass(frozen=True)
class QuantizationSpec:
    """How to quantize linear layers.

    Attributes:
        format: "fp8" (float8_e4m3fn) or "int8".
        weight_granularity: one weight scale "per row" (output feature) or "per tensor".
        activations: how a layer's input is quantized; "static" is FP8 with a calibrated scale, "none" is
            weight-only.
        fast_accumulation: FP8 only; sums are kept in fewer bits between tensor-core steps, which is faster.
        components: what is quantized, of `QUANTIZABLE_COMPONENTS`.
        skip: glob patterns of layer names that stay as they are. A pattern belongs to the first of `components`, or
            to the one named before a colon: `text_encoder:encoder.block.0.*`.
    """

    format: str
    weight_granularity: str = "per row"
    activations: str = "dynamic per row"
    fast_accumulation: bool = True
    components: tuple[str, ...] = ("transformer",)
    skip: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            ValueError: a value is not one of those allowed, or the combination does not exist.
        """
        _check_choice("format", self.format, FORMATS)
        _check_choice("weight_granularity", self.weight_granularity, WEIGHT_GRANULARITIES)
        _check_choice("activations", self.activations, ACTIVATIONS)
        if self.format == "int8" and self.activations == "static":
            raise ValueError(
                "activations is 'static', which INT8 does not support: choose 'dynamic per row', 'dynamic per tensor' "
                "or 'none', or the format 'fp8'."
            )
        if not self.components:
            raise ValueError(f"components is empty: name at least one of {', '.join(QUANTIZABLE_COMPONENTS)}.")
        for component in self.components:
            if component == "vae":
                raise ValueError(f"components names the vae, which is never quantized ({_VAE_REASON}): leave it out.")
            _check_choice("components", component, QUANTIZABLE_COMPONENTS)
        if sum(map(len, self.skip)) > _MOST_LETTERS:
            raise ValueError(f"skip has {sum(map(len, self.skip))} letters: write up to {_MOST_LETTERS}.")
        for pattern in self.skip:
            component, _, name = pattern.rpartition(":")
            if not name or (component and component not in self.components):
                known = ", ".join(self.components)
                raise ValueError(
                    f"skip has the pattern {pattern[:_SHOWN_LETTERS]!r}: give a layer name pattern such as blocks.0.*, "
                    f"with one of {known} and a colon before it where it is not for {self.components[0]}."
                )

    def skip_patterns(self, component: str) -> tuple[str, ...]:
        """The patterns that belong to `component`, without its name."""
        split = [pattern.rpartition(":") for pattern in self.skip]
        return tuple(name for owner, _, name in split if (owner or self.components[0]) == component)

    def as_dict(self) -> dict[str, Any]:
        """The fields as JSON values; `from_dict` takes them."""
        return {
            "format": self.format,
            "weight_granularity": self.weight_granularity,
            "activations": self.activations,
            "fast_accumulation": self.fast_accumulation,
            "components": list(self.components),
            "skip": list(self.skip),
        }

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> QuantizationSpec:
        """The specification whose `as_dict` is `fields`; raises ValueError for unknown or wrong fields."""
        known = {name: fields[name] for name in cls.__dataclass_fields__ if name in fields}
        if "format" not in known or set(fields) - set(known):
            raise ValueError(
                f"{dict(fields)} is not a quantization: give the fields {', '.join(cls.__dataclass_fields__)}."
            )
        for name in ("components", "skip"):
            if name in known:
                known[name] = tuple(known[name])
        return cls(**known)


@dataclass(frozen=True)
class PlannedLayer:
    """One layer of a plan; `reason` says why it is not quantized and is empty when it is, `note` how else it is."""

    name: str
    shape: tuple[int, ...]
    reason: str
    bytes_before: int
    bytes_after: int
    note: str = ""

    @property
    def quantized(self) -> bool:
        """Whether the layer is quantized."""
        return not self.reason


@dataclass(frozen=True)
class QuantizationPlan:
    """Which layers of a component are quantized, and their bytes.

    Attributes:
        component: whose layers they are.
        spec: how they are quantized; None when nothing is.
        layers: in the order given.
        other_bytes: of tensors other than layer weights (biases, norms), the same before and after.
    """

    component: str
    spec: QuantizationSpec | None
    layers: tuple[PlannedLayer, ...]
    other_bytes: int = 0

    @property
    def quantized_names(self) -> tuple[str, ...]:
        """The layers to quantize."""
        return tuple(layer.name for layer in self.layers if layer.quantized)

    @property
    def bytes_before(self) -> int:
        """Bytes of the component unquantized."""
        return self.other_bytes + sum(layer.bytes_before for layer in self.layers)

    @property
    def bytes_after(self) -> int:
        """Bytes of the component quantized, scales included."""
        return self.other_bytes + sum(layer.bytes_after for layer in self.layers)

    def skipped_by_reason(self) -> dict[str, list[PlannedLayer]]:
        """The layers that stay, by reason."""
        reasons: dict[str, list[PlannedLayer]] = {}
        for layer in self.layers:
            if not layer.quantized:
                reasons.setdefault(layer.reason, []).append(layer)
        return reasons

    def summary(self) -> str:
        """A table to read: what is quantized, what stays and why, bytes before and after."""
        done = [layer for layer in self.layers if layer.quantized]
        how = f"{self.spec.format}, weights {self.spec.weight_granularity}" if self.spec else "not quantized"
        if self.spec:
            how += f", activations {self.spec.activations}"
        noted: dict[str, list[PlannedLayer]] = {}
        for layer in done:
            noted.setdefault(layer.note, []).append(layer)
        rows = [(f"quantized: {note}" if note else "quantized", layers) for note, layers in noted.items()]
        rows += [(f"stays: {reason}", layers) for reason, layers in self.skipped_by_reason().items()]
        width = max([len(label) for label, _ in rows] + [len("biases, norms and other")])
        lines = [f"{self.component}: {how}", f"{'':{width}}  layers  MB before  MB after"]
        for label, layers in rows:
            before, after = sum(x.bytes_before for x in layers), sum(x.bytes_after for x in layers)
            lines.append(f"{label:{width}}  {len(layers):6}  {before / 1e6:9.1f}  {after / 1e6:8.1f}")
        other = self.other_bytes / 1e6
        lines.append(f"{'biases, norms and other':{width}}  {'':6}  {other:9.1f}  {other:8.1f}")
        lines.append(f"{'all':{width}}  {'':6}  {self.bytes_before / 1e6:9.1f}  {self.bytes_after / 1e6:8.1f}")
        return "\n".join(lines)


def summarise_plan(plan: QuantizationPlan) -> dict[str, Any]:
    """The plan in a few JSON values: how many layers are quantized, how many stay and why, bytes before and after."""
    return {
        "component": plan.component,
        "format": plan.spec.format if plan.spec else None,
        "layers_quantized": len(plan.quantized_names),
        "layers_noted": dict(Counter(layer.note for layer in plan.layers if layer.note)),
        "layers_kept": {reason: len(layers) for reason, layers in plan.skipped_by_reason().items()},
        "bytes_before": plan.bytes_before,
        "bytes_after": plan.bytes_after,
    }


def quantized_bytes(shape: tuple[int, ...], spec: QuantizationSpec) -> int:
    """Bytes of a quantized weight [out, in] with its float32 scales."""
    rows, columns = shape
    scales = rows if spec.weight_granularity == "per row" else 1
    return rows * columns + scales * 4


def plan_layers(
    named_linear_shapes: Mapping[str, tuple[int, ...]],
    spec: QuantizationSpec | None,
    component: str,
    preset: LayerPreset | None,
    *,
    dtype: torch.dtype = torch.bfloat16,
    itemsizes: Mapping[str, int] = NO_ITEMSIZES,
    other_bytes: int = 0,
) -> QuantizationPlan:
    """Decide for each layer whether it is quantized.

    Args:
        named_linear_shapes: layer name (without `.weight`) to weight shape [out, in]; other shapes are reported
            as staying.
        spec: None plans no quantization.
        component: its name.
        preset: which of its layers are quantized; None for none.
        dtype: of the unquantized weights.
        itemsizes: bytes per element of layers which are kept in another dtype.
        other_bytes: see `QuantizationPlan`.

    Raises:
        ValueError: a skip pattern matches no layer, or the patterns leave nothing to quantize.
    """
    layers = []
    for name, shape in named_linear_shapes.items():
        before = torch.Size(shape).numel() * itemsizes.get(name, dtype.itemsize)
        reason = _reason_to_stay(name, shape, spec, component, preset)
        after = before if reason or spec is None else quantized_bytes(shape, spec)
        layers.append(PlannedLayer(name, tuple(shape), reason, before, after))
    if spec is not None and component in spec.components:
        layers = _skip(layers, spec.skip_patterns(component), component)
    return QuantizationPlan(component, spec, tuple(layers), other_bytes)


def _reason_to_stay(
    name: str, shape: tuple[int, ...], spec: QuantizationSpec | None, component: str, preset: LayerPreset | None
) -> str:
    if spec is None:
        return "no quantization asked for"
    if component not in spec.components or preset is None:
        return f"the {component} is not among the components to quantize"
    reason = preset.reason_to_stay(name, spec.format)
    if reason:
        return reason
    if len(shape) != 2 or shape[0] % KERNEL_MULTIPLE or shape[1] % KERNEL_MULTIPLE:
        return f"in or out features not a multiple of {KERNEL_MULTIPLE}, which the kernels need"
    return ""


def _skip(layers: list[PlannedLayer], patterns: tuple[str, ...], component: str) -> list[PlannedLayer]:
    """`layers` with those that a pattern matches left as they are."""
    for pattern in patterns:
        if not any(fnmatchcase(layer.name, pattern) for layer in layers):
            examples = ", ".join(layer.name for layer in layers if layer.quantized) or "none"
            raise ValueError(
                f"skip pattern {pattern[:_SHOWN_LETTERS]!r} matches no layer of the {component}: its layers are named "
                f"like {examples[:200]}."
            )
    skipped = [_skipped(layer, patterns) for layer in layers]
    if any(layer.quantized for layer in layers) and not any(layer.quantized for layer in skipped):
        raise ValueError(
            f"skip {', '.join(map(repr, patterns))[:_SHOWN_LETTERS]} leaves no layer of the {component} to quantize: "
            "give narrower patterns, or take the component out of components."
        )
    return skipped


def _skipped(layer: PlannedLayer, patterns: tuple[str, ...]) -> PlannedLayer:
    match = next((pattern for pattern in patterns if fnmatchcase(layer.name, pattern)), None)
    if match is None or not layer.quantized:
        return layer
    return replace(layer, reason=f"skip pattern {match!r}", bytes_after=layer.bytes_before)


def _check_choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} is {value!r}: choose one of {', '.join(map(repr, allowed))}.")
