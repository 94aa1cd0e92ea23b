"""ComfyUI's format of quantized checkpoints: which keys belong to a quantized layer, and what they say.

Read off ComfyUI 0.33's `comfy/ops.py` (`_load_quantized_module`) and `comfy/utils.py` (`convert_old_quants`). A
quantized layer has `{layer}.weight`, `{layer}.weight_scale`, perhaps `{layer}.input_scale`, and is marked by
`{layer}.comfy_quant` (JSON in a uint8 tensor) or in the header's `_quantization_metadata`. Older FP8 files say
`scale_weight` and `scale_input` and have one `scaled_fp8` tensor, of two elements when products are in full
precision.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from .checkpoint_error import CheckpointError, shown, shown_word
from .json_text import parse_json
from .row_sources import QuantizedRows, RowSource, ScaledRows, elements, read_whole
from .safetensors_reading import FileHeader

FORMATS = {"float8_e4m3fn": torch.float8_e4m3fn, "int8_tensorwise": torch.int8}
# Has no layer that computes with it here: its weights are dequantized while they are read.
DEQUANTIZED_FORMAT = "float8_e5m2"
_ALL_FORMATS = {**FORMATS, DEQUANTIZED_FORMAT: torch.float8_e5m2}
METADATA_KEY = "_quantization_metadata"
LEGACY_MARK = "scaled_fp8"
_SCALES = (".weight_scale", ".scale_weight")
_INPUT_SCALES = (".input_scale", ".scale_input")
_MARK = ".comfy_quant"
# A mark has some 60 bytes.
_LARGEST_MARK = 1024
_EIGHT_BITS = frozenset({torch.float8_e4m3fn, torch.float8_e5m2, torch.int8})


def gather_quantized(
    path: Path, header: FileHeader, tensors: Mapping[str, RowSource], prefix: str = ""
) -> dict[str, RowSource]:
    """Combine each quantized weight with its scales.

    Args:
        path: the file.
        header: of the file.
        tensors: of the file, by names without `prefix`, including those of quantization.
        prefix: precedes the names in the file, and possibly in its metadata.

    Returns:
        What a model's state dict has, by name: plain tensors as they are, quantized weights as `QuantizedRows`, or as
        `ScaledRows` in the format that is not computed with.

    Raises:
        CheckpointError: a format that is not read here, an absent scale, a scale of the wrong size, or one without a
            quantized weight.
    """
    legacy = tensors.get(LEGACY_MARK)
    plain: dict[str, RowSource] = {name: t for name, t in tensors.items() if not _is_quantization_key(name)}
    marks = _marks(path, header, tensors, prefix)
    if legacy is None and not marks and len(plain) == len(tensors):
        return plain
    _check_scales_have_weights(path, tensors, plain, marks)
    full_precision = legacy is not None and elements(legacy) == 2
    gathered: dict[str, RowSource] = {}
    for name, source in plain.items():
        gathered[name] = source
        layer = name.removesuffix(".weight")
        if not name.endswith(".weight") or (source.dtype not in _EIGHT_BITS and layer not in marks):
            continue
        if len(source.shape) < 2:
            raise CheckpointError(
                f"{path} has {name} of shape {list(source.shape)} in 8 bits, and only matrices are quantized: give "
                "another file."
            )
        scale = _first(tensors, layer, _SCALES)
        mark = marks.get(layer) or {"format": _format_of(source.dtype), "full_precision_matrix_mult": full_precision}
        _check_layer(path, layer, mark, source.dtype, scale is not None)
        assert scale is not None
        _check_scale(path, name, scale, source.shape[0])
        if mark["format"] == DEQUANTIZED_FORMAT:
            gathered[name] = ScaledRows(source, scale)
            continue
        gathered[name] = QuantizedRows(
            source,
            scale,
            str(mark["format"]),
            _first(tensors, layer, _INPUT_SCALES),
            bool(mark.get("full_precision_matrix_mult", False)),
        )
    return gathered


def _is_quantization_key(name: str) -> bool:
    return name == LEGACY_MARK or name.endswith((_MARK, *_SCALES, *_INPUT_SCALES, ".weight_scale_2"))


def _first(tensors: Mapping[str, RowSource], layer: str, suffixes: tuple[str, ...]) -> RowSource | None:
    return next((tensors[layer + suffix] for suffix in suffixes if layer + suffix in tensors), None)


def _format_of(dtype: torch.dtype) -> str:
    return {torch.int8: "int8_tensorwise", torch.float8_e5m2: DEQUANTIZED_FORMAT}.get(dtype, "float8_e4m3fn")


def _marks(path: Path, header: FileHeader, tensors: Mapping[str, RowSource], prefix: str) -> dict[str, dict[str, Any]]:
    """What the file says about each quantized layer, by layer name without `prefix`."""
    marks: dict[str, dict[str, Any]] = {}
    text = header.metadata.get(METADATA_KEY)
    if text is not None:
        place = f"the quantization metadata of {path}"
        layers = parse_json(text, place).get("layers")
        if not isinstance(layers, dict) or not all(isinstance(mark, dict) for mark in layers.values()):
            raise CheckpointError(
                f"{path} has quantization metadata that cannot be read (its layers are {shown(layers)}): download it "
                "again."
            )
        marks |= {name.removeprefix(prefix): mark for name, mark in layers.items()}
    for name, source in tensors.items():
        if name.endswith(_MARK):
            if source.dtype != torch.uint8 or elements(source) > _LARGEST_MARK:
                raise CheckpointError(
                    f"{path} has quantization metadata that cannot be read ({name} is {list(source.shape)} of "
                    f"{source.dtype}, and such a mark has up to {_LARGEST_MARK} bytes): download it again."
                )
            content = read_whole(source).numpy().tobytes()
            marks[name.removesuffix(_MARK)] = parse_json(content, f"{name} in {path}")
    return marks


def _check_layer(path: Path, layer: str, mark: Mapping[str, Any], dtype: torch.dtype, has_scale: bool) -> None:
    format_ = mark.get("format")
    if not isinstance(format_, str) or format_ not in _ALL_FORMATS:
        raise CheckpointError(
            f"{path} stores {layer} as {shown_word(format_)}, allowed are {', '.join(_ALL_FORMATS)}: give a file in "
            "one of these formats, or an unquantized one."
        )
    if mark.get("convrot") or (isinstance(mark.get("params"), dict) and mark["params"].get("convrot")):
        raise CheckpointError(
            f"{path} stores {layer} rotated (convrot), which is not supported: give a plain INT8 file."
        )
    if dtype != _ALL_FORMATS[format_]:
        raise CheckpointError(
            f"{path} marks {layer} as {format_} but stores {dtype}: download it again, or give another file."
        )
    if not has_scale:
        raise CheckpointError(
            f"{path} lacks the scale of {layer} ({layer}.weight_scale), which its {format_} weight needs: give the "
            "complete file."
        )


def _check_scales_have_weights(
    path: Path, tensors: Mapping[str, RowSource], plain: Mapping[str, RowSource], marks: Mapping[str, Any]
) -> None:
    """Raise CheckpointError for a scale whose weight is absent or not of 8 bits: is it multiplied already?"""
    for key in tensors:
        suffix = next((suffix for suffix in _SCALES if key.endswith(suffix)), None)
        if suffix is None:
            continue
        weight = plain.get(key.removesuffix(suffix) + ".weight")
        stored = "absent" if weight is None else str(weight.dtype).removeprefix("torch.")
        if weight is None or (weight.dtype not in _EIGHT_BITS and key.removesuffix(suffix) not in marks):
            raise CheckpointError(
                f"{path} has the scale {key}, and its weight is {stored} instead of 8 bits: nothing says whether it is "
                "multiplied already, so give the quantized file as its maker published it, or the unquantized one."
            )


def _check_scale(path: Path, name: str, scale: RowSource, rows: int) -> None:
    if elements(scale) not in (1, rows) or not scale.dtype.is_floating_point:
        raise CheckpointError(
            f"{path} has a scale of shape {list(scale.shape)} for {name}, allowed are one number or "
            f"{rows}, one per row: give another file."
        )
