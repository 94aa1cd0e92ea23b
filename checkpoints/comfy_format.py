"""ComfyUI's format of quantized checkpoints: which keys belong to a quantized layer, and what they say.

Read off ComfyUI 0.33's `comfy/ops.py` (`_load_quantized_module`) and `comfy/utils.py` (`convert_old_quants`). A
quantized layer has `{layer}.weight`, `{layer}.weight_scale`, perhaps `{layer}.input_scale`, and is marked by
`{layer}.comfy_quant` (JSON in a uint8 tensor) or in the header's `_quantization_metadata`. Older FP8 files say
`scale_weight` and `scale_input` and have one `scaled_fp8` tensor, of two elements when products are in full
precision.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from .checkpoint_files import CheckpointError, TensorSource, by_file, open_checkpoint, read_headers

FORMATS = {"float8_e4m3fn": torch.float8_e4m3fn, "int8_tensorwise": torch.int8}
METADATA_KEY = "_quantization_metadata"
LEGACY_MARK = "scaled_fp8"
_SCALES = (".weight_scale", ".scale_weight")
_INPUT_SCALES = (".input_scale", ".scale_input")
_MARK = ".comfy_quant"
_EIGHT_BITS = frozenset({torch.float8_e4m3fn, torch.float8_e5m2, torch.int8})


@dataclass(frozen=True)
class StoredWeight:
    """A weight that a file holds quantized.

    Attributes:
        format: one of `FORMATS`.
        scale: float32 tensor of 1 element or one per row; weight = stored * scale.
        input_scale: scale of static activations, or None.
        full_precision: the file wants products in full precision, so activations are not quantized.
    """

    format: str
    scale: TensorSource
    input_scale: TensorSource | None = None
    full_precision: bool = False


@dataclass(frozen=True)
class SplitCheckpoint:
    """The keys of a file: what a model's state dict has, and how the quantized weights among it are stored."""

    plain: Mapping[str, TensorSource]
    stored: Mapping[str, StoredWeight] = field(default_factory=dict)


def file_metadata(path: Path) -> dict[str, str]:
    """The header's free text fields; empty when there are none."""
    with open_checkpoint(path) as opened:
        return dict(opened.metadata() or {})


def split_quantized(path: Path, keys: Mapping[str, TensorSource], prefix: str = "") -> SplitCheckpoint:
    """Tell weights from the keys of quantization in `path`.

    Args:
        path: the file.
        keys: names without `prefix`, each with where it is stored.
        prefix: what stood before the names in the file, and may stand in its metadata.

    Returns:
        Weights by name; `stored` by the name of the weight, such as `blocks.0.self_attn.q.weight`.

    Raises:
        CheckpointError: a format other than those of `FORMATS`, an absent scale, or a scale of the wrong size.
    """
    legacy = keys.get(LEGACY_MARK)
    plain = {name: source for name, source in keys.items() if not _is_quantization_key(name)}
    marks = _marks(path, keys, prefix)
    if legacy is None and not marks and len(plain) == len(keys):
        return SplitCheckpoint(plain)
    full_precision = legacy is not None and read_headers({LEGACY_MARK: legacy})[LEGACY_MARK].elements == 2
    headers = read_headers(plain)
    stored: dict[str, StoredWeight] = {}
    for name, header in headers.items():
        layer = name.removesuffix(".weight")
        scale = _first(keys, layer, _SCALES)
        if not name.endswith(".weight") or (header.dtype not in _EIGHT_BITS and layer not in marks):
            continue
        mark = marks.get(layer) or {"format": _format_of(header.dtype), "full_precision_matrix_mult": full_precision}
        _check_layer(path, layer, mark, header.dtype, scale is not None)
        assert scale is not None
        input_scale = _first(keys, layer, _INPUT_SCALES)
        stored[name] = StoredWeight(
            str(mark["format"]), scale, input_scale, bool(mark.get("full_precision_matrix_mult", False))
        )
    _check_scales(path, stored, {name: header.shape[0] for name, header in headers.items() if header.shape})
    return SplitCheckpoint(plain, stored)


def read_scale(source: TensorSource, device: torch.device | str, opened: Any = None) -> torch.Tensor:  # noqa: ANN401
    """A stored scale as float32 [1] or [rows] on `device`; `opened` is its file when that is open already.

    Raises CheckpointError when it is not finite or negative.
    """
    if opened is None:
        with open_checkpoint(source.file) as handle:
            return read_scale(source, device, handle)
    scale = opened.get_tensor(source.key).to(device, torch.float32, copy=True).reshape(-1)
    if not bool(torch.isfinite(scale).all()) or bool((scale < 0).any()):
        raise CheckpointError(f"{source.key} in {source.file} is not finite or negative: download the file again.")
    return scale


def read_single_scales(stored: Mapping[str, StoredWeight]) -> dict[str, float]:
    """The scales that are one number, by weight; those with one per row are left out. Each file is opened once.

    Raises CheckpointError when one is not finite or negative.
    """
    sources = {name: weight.scale for name, weight in stored.items()}
    single = {name: sources[name] for name, header in read_headers(sources).items() if header.elements == 1}
    values: dict[str, float] = {}
    for file, names in by_file(single).items():
        with open_checkpoint(file) as opened:
            values |= {name: float(read_scale(single[name], "cpu", opened)) for name in names}
    return values


def _is_quantization_key(name: str) -> bool:
    return name == LEGACY_MARK or name.endswith((_MARK, *_SCALES, *_INPUT_SCALES, ".weight_scale_2"))


def _first(keys: Mapping[str, TensorSource], layer: str, suffixes: tuple[str, ...]) -> TensorSource | None:
    return next((keys[layer + suffix] for suffix in suffixes if layer + suffix in keys), None)


def _format_of(dtype: torch.dtype) -> str:
    return {torch.int8: "int8_tensorwise", torch.float8_e5m2: "float8_e5m2"}.get(dtype, "float8_e4m3fn")


def _marks(path: Path, keys: Mapping[str, TensorSource], prefix: str) -> dict[str, dict[str, Any]]:
    """What the file says about each quantized layer, by layer name without `prefix`."""
    marks: dict[str, dict[str, Any]] = {}
    text = file_metadata(path).get(METADATA_KEY)
    try:
        if text is not None:
            layers = json.loads(text)["layers"]
            marks |= {name.removeprefix(prefix): dict(mark) for name, mark in layers.items()}
        marked = {name: source for name, source in keys.items() if name.endswith(_MARK)}
        if marked:
            with open_checkpoint(path) as opened:
                for name, source in marked.items():
                    content = opened.get_tensor(source.key).numpy().tobytes()
                    marks[name.removesuffix(_MARK)] = dict(json.loads(content))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{path} has quantization metadata that cannot be read ({error!r}): download it again."
        ) from error
    return marks


def _check_layer(path: Path, layer: str, mark: Mapping[str, Any], dtype: torch.dtype, has_scale: bool) -> None:
    format_ = mark.get("format")
    if format_ not in FORMATS:
        raise CheckpointError(
            f"{path} stores {layer} as {format_}, allowed are {', '.join(FORMATS)}: give a file in one of these "
            "formats, or an unquantized one."
        )
    if mark.get("convrot") or (isinstance(mark.get("params"), dict) and mark["params"].get("convrot")):
        raise CheckpointError(
            f"{path} stores {layer} rotated (convrot), which is not read here: give a plain INT8 file."
        )
    if dtype != FORMATS[format_]:
        raise CheckpointError(
            f"{path} marks {layer} as {format_} but stores {dtype}: download it again, or give another file."
        )
    if not has_scale:
        raise CheckpointError(
            f"{path} lacks the scale of {layer} ({layer}.weight_scale), without which its {format_} weight means "
            "nothing: give the complete file."
        )


def _check_scales(path: Path, stored: Mapping[str, StoredWeight], rows: Mapping[str, int]) -> None:
    headers = read_headers({name: weight.scale for name, weight in stored.items()})
    for name, header in headers.items():
        if header.elements not in (1, rows[name]) or not header.dtype.is_floating_point:
            raise CheckpointError(
                f"{path} has a scale of shape {list(header.shape)} for {name}, allowed are one number or "
                f"{rows[name]}, one per row: give another file."
            )
