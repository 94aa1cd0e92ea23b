"""Where the rows of a tensor go: a plain parameter, or the weight of a quantized layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

from ..ops.weight_filling import WeightFilling
from .lora_rows import stored_quantized
from .row_sources import QuantizedRows, RowSource, read_scale


class Destination(Protocol):
    """Takes the rows of one parameter, which may come from several tensors."""

    def prepare(self, sources: Sequence[RowSource]) -> None:
        """Read all values once before the first `take`, if a property of all of them is needed."""

    def take(self, start: int, source: RowSource) -> int:
        """Write all rows of `source` after the first `start` rows; returns the bytes they take there."""


class PlainDestination:
    """A parameter or buffer that holds the values cast to its dtype.

    Args:
        tensor: allocated, on its device.
    """

    def __init__(self, tensor: torch.Tensor) -> None:
        self._tensor = tensor

    def prepare(self, sources: Sequence[RowSource]) -> None:
        """Do nothing."""

    def take(self, start: int, source: RowSource) -> int:
        """Copy; a quantized source arrives dequantized."""
        rows = self._tensor if self._tensor.ndim else self._tensor.view(1)
        taken = 0
        for first, values in source.chunks(self._tensor.device):
            part = rows[start + first : start + first + values.shape[0]]
            part.copy_(values)
            taken += part.numel() * part.element_size()
        return taken


class QuantizedDestination:
    """The weight of a quantized layer, quantized while it is read or copied in its stored format.

    Args:
        filling: of the layer.
    """

    def __init__(self, filling: WeightFilling) -> None:
        self._filling = filling

    def prepare(self, sources: Sequence[RowSource]) -> None:
        """Find the single scale of all parts, if the layer has one; `take` reads the parts again."""
        if not self._filling.must_observe:
            return
        for source in sources:
            if not isinstance(source, QuantizedRows):
                for _, values in source.chunks(self._filling.device):
                    self._filling.observe(values)

    def take(self, start: int, source: RowSource) -> int:
        """Quantize the rows; those that are stored quantized and unchanged are taken as they are, with their scale."""
        stored = stored_quantized(source)
        if isinstance(source, QuantizedRows):
            for first, values, scale in source.quantized_chunks(self._filling.device):
                self._filling.copy_rows(start + first, values, scale)
        else:
            for first, values in source.chunks(self._filling.device):
                self._filling.write(start + first, values)
        input_bytes = 0 if stored is None else self._take_input_scale(stored)
        return self._filling.bytes_of(source.shape[0]) + input_bytes

    def _take_input_scale(self, source: QuantizedRows) -> int:
        """Keep the scale of static activations, the largest if parts differ; returns its bytes for the first part."""
        filling = self._filling
        if filling.spec.activations != "static" or source.input_scale is None:
            return 0
        scale = read_scale(source.input_scale, filling.device).amax().reshape(1, 1)
        known = filling.input_scale
        filling.input_scale = scale if known is None else torch.maximum(known, scale)
        return 0 if known is not None else scale.element_size()
