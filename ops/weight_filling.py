"""Quantized weights filled a few rows at a time, so that no whole weight exists in BF16 while a model loads."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from functools import cached_property

import torch
from torch import nn

from .fp8_linear import (
    FP8_DTYPE,
    FP8Linear,
    check_finite,
    fp8_scale,
    largest_magnitude,
    round_to_fp8,
)
from .int8 import Int8Linear, int8_tensor_scale, quantize_int8_rows
from .quantization import QuantizationSpec

# A chunk takes 4 MB in float32; a handful of such tensors are alive while it is quantized.
CHUNK_ELEMENTS = 2**20


def row_chunks(rows: int, columns: int) -> Iterator[slice]:
    """Consecutive slices of at most `CHUNK_ELEMENTS` elements (at least one row) that cover `rows`."""
    step = max(1, CHUNK_ELEMENTS // max(1, columns))
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def weight_magnitude(values: torch.Tensor, granularity: str) -> torch.Tensor:
    """The same as `largest_magnitude`, in a sixth of its time on a CPU; a forward could not afford the temporaries."""
    if values.device.type != "cpu":
        return largest_magnitude(values, granularity)
    # Torch's largest and smallest are vectorised on a CPU, its norm of this order is not.
    dim = (-1,) if granularity == "per row" else (0, 1)
    return torch.maximum(values.amax(dim, keepdim=True), -values.amin(dim, keepdim=True)).to(torch.float32)


class WeightFilling(ABC):
    """The quantized weight of one linear layer while it is filled.

    Weights "per row" are written in one pass. Weights "per tensor" need two: all rows through `observe`, then all
    through `write`. Already quantized rows go through `copy_rows` with their scale.

    Attributes:
        name: of the layer, for messages.
        spec: how it is quantized.
        dtype: of the unquantized weight; values are rounded to it first, as a loaded weight would be.
        shape: [out, in].
        device: where weights are quantized.
        home: where the quantized weight lies.
        input_scale: float32 [1, 1], for static activations, or None.
    """

    data_dtype: torch.dtype

    def __init__(
        self,
        name: str,
        shape: tuple[int, int],
        spec: QuantizationSpec,
        *,
        device: torch.device | str,
        dtype: torch.dtype,
        home: torch.device | None = None,
    ) -> None:
        self.name = name
        self.spec = spec
        self.dtype = dtype
        self.shape = shape
        self.device = torch.device(device)
        self.home = self.device if home is None else home
        self.input_scale: torch.Tensor | None = None
        self._magnitude: torch.Tensor | None = None
        self._scale_counted = False

    @cached_property
    def data(self) -> torch.Tensor:
        """The quantized weight [out, in], allocated on first use."""
        return torch.empty(self.shape, dtype=self.data_dtype, device=self.home)

    @cached_property
    def scale(self) -> torch.Tensor:
        """float32 [out, 1] or [1, 1]."""
        rows = self.shape[0] if self.spec.weight_granularity == "per row" else 1
        return torch.zeros((rows, 1), dtype=torch.float32, device=self.device)

    def allocate(self) -> None:
        """Allocate the weight and its scale now, before others take the memory between them."""
        _ = self.data, self.scale

    @property
    def must_observe(self) -> bool:
        """Whether all rows have to be observed before the first is written."""
        return self.spec.weight_granularity == "per tensor" and self._magnitude is None

    def observe(self, values: torch.Tensor) -> None:
        """Include `values` [rows, in] in the largest magnitude; raises ValueError for inf or NaN."""
        magnitude = weight_magnitude(values.to(self.dtype), "per tensor")
        check_finite(magnitude, self.name)
        self._magnitude = magnitude if self._magnitude is None else torch.maximum(self._magnitude, magnitude)

    def write(self, start: int, values: torch.Tensor) -> None:
        """Quantize `values` [rows, in] into the rows from `start`; raises ValueError for inf or NaN."""
        values = values.to(self.dtype)
        rows = slice(start, start + values.shape[0])
        if self.spec.weight_granularity == "per row":
            magnitude = weight_magnitude(values, "per row")
            check_finite(magnitude, self.name)
            self.data[rows], self.scale[rows] = self._quantize_rows(values, magnitude)
            return
        if self._magnitude is None:
            raise RuntimeError(f"{self.name} has one scale: observe all of its rows before writing any.")
        self.scale.copy_(self._tensor_scale(self._magnitude))
        self.data[rows] = self._quantize_with(values, self.scale)

    def copy_rows(self, start: int, stored: torch.Tensor, scale: torch.Tensor) -> None:
        """Copy rows that are already quantized, with their float32 scale of 1 or `rows` elements."""
        rows = slice(start, start + stored.shape[0])
        self.data[rows].copy_(stored)
        scale = scale.reshape(-1, 1)
        if self.scale.shape[0] == 1:
            self.scale.copy_(scale)
        else:
            self.scale[rows] = scale.expand(stored.shape[0], 1)

    def bytes_of(self, rows: int) -> int:
        """Bytes that `rows` rows take, with their scales; a scale per tensor counts with the first rows."""
        scales = rows if self.scale.shape[0] > 1 else int(not self._scale_counted)
        self._scale_counted = True
        return rows * self.data.shape[1] * self.data.element_size() + scales * self.scale.element_size()

    @abstractmethod
    def finish(self, linear: nn.Linear) -> nn.Module:
        """The quantized layer, with the bias of `linear`."""

    @abstractmethod
    def _quantize_rows(self, values: torch.Tensor, magnitude: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]: ...

    @abstractmethod
    def _tensor_scale(self, magnitude: torch.Tensor) -> torch.Tensor: ...

    @abstractmethod
    def _quantize_with(self, values: torch.Tensor, scale: torch.Tensor) -> torch.Tensor: ...


class FP8Filling(WeightFilling):
    """Fills the weight of an `FP8Linear`."""

    data_dtype = FP8_DTYPE

    def finish(self, linear: nn.Linear) -> FP8Linear:
        """An `FP8Linear` in place of `linear`."""
        return FP8Linear(
            self.data,
            self.scale.view(1, -1).to(self.home),
            linear.bias,
            activations=self.spec.activations,
            fast_accumulation=self.spec.fast_accumulation,
            input_scale=self.input_scale,
        ).train(linear.training)

    def _quantize_rows(self, values: torch.Tensor, magnitude: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        scale = fp8_scale(magnitude)
        return round_to_fp8(values, scale), scale

    def _tensor_scale(self, magnitude: torch.Tensor) -> torch.Tensor:
        return fp8_scale(magnitude.clone())

    def _quantize_with(self, values: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return round_to_fp8(values, scale)


class Int8Filling(WeightFilling):
    """Fills the weight of an `Int8Linear`; the numbers are torchao's."""

    data_dtype = torch.int8

    def finish(self, linear: nn.Linear) -> Int8Linear:
        """An `Int8Linear` in place of `linear`."""
        scale = self.scale.view(1, -1).to(self.home)
        return Int8Linear(self.data, scale, linear.bias, activations=self.spec.activations).train(linear.training)

    def _quantize_rows(self, values: torch.Tensor, magnitude: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return quantize_int8_rows(values, self.spec, None)

    def _tensor_scale(self, magnitude: torch.Tensor) -> torch.Tensor:
        return int8_tensor_scale(magnitude, self.spec, self.dtype)

    def _quantize_with(self, values: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return quantize_int8_rows(values, self.spec, scale)[0]


FILLINGS: dict[str, type[WeightFilling]] = {"fp8": FP8Filling, "int8": Int8Filling}


def replace_layer(model: nn.Module, name: str, layer: nn.Module) -> None:
    """Put `layer` in the place of the sub-module `name`."""
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, layer)
