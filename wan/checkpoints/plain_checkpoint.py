"""A Wan transformer, wherever it lies and whatever is around its names, as one safetensors file with Wan's names."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from ...checkpoints.comfy_format import DEQUANTIZED_FORMAT
from ...checkpoints.row_sources import QuantizedRows, RowSource, ScaledRows
from ...checkpoints.tensor_writing import Planned, PlannedFile, PlannedRows
from .components import transformer_weights
from .original_names import original_name
from .quantized_checkpoint import file_metadata, layer_mark


def plan_plain_checkpoint(source: Path, *, averaged: bool = True) -> PlannedFile:
    """The file to write for the transformer in `source`, a pipeline folder or a single file; no weight is read.

    Tensors stay as they are stored, quantized ones with their scales in ComfyUI's format. `averaged`: of a training
    checkpoint with both, take the exponential moving average of the weights. Raises CheckpointError for anything but a
    complete Wan text-to-video transformer.
    """
    weights = transformer_weights(source, averaged=averaged)
    tensors = [planned for name, rows in weights.sources.items() for planned in _tensors(original_name(name), rows)]
    return PlannedFile(tuple(tensors), file_metadata(weights.config, weights.spec))


def _tensors(name: str, source: RowSource) -> Iterator[Planned]:
    layer = name.removesuffix(".weight")
    if isinstance(source, QuantizedRows):
        yield PlannedRows(name, source.values)
        yield PlannedRows(f"{layer}.weight_scale", source.scale)
        if source.input_scale is not None:
            yield PlannedRows(f"{layer}.input_scale", source.input_scale)
        yield layer_mark(layer, source.format, full_precision=source.full_precision)
    elif isinstance(source, ScaledRows):
        yield PlannedRows(name, source.values)
        yield PlannedRows(f"{layer}.weight_scale", source.scale)
        yield layer_mark(layer, DEQUANTIZED_FORMAT, full_precision=False)
    else:
        yield PlannedRows(name, source)
