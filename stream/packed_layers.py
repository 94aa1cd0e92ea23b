"""A layer's tensors in one block of memory, so that one copy brings the whole layer to the device."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

# cuBLAS and Triton read fastest from addresses that are multiples of this.
ALIGNMENT = 256


@dataclass(frozen=True)
class TensorPlace:
    """Where a module keeps a tensor.

    Attributes:
        owner: a module, or a quantized tensor that is made of others.
        name: of the attribute.
    """

    owner: Any
    name: str

    def get(self) -> torch.Tensor:
        """The tensor that is there."""
        tensor: torch.Tensor = getattr(self.owner, self.name)
        return tensor

    def put(self, tensor: torch.Tensor) -> None:
        """Put another one there. Parameters stay the same objects, with other data."""
        if not isinstance(self.owner, nn.Module):
            setattr(self.owner, self.name, tensor)
        elif self.name in self.owner._parameters:
            self.get().data = tensor
        else:
            self.owner._buffers[self.name] = tensor


@dataclass(frozen=True)
class _Part:
    """A tensor in the block, with every place that it is kept at."""

    places: tuple[TensorPlace, ...]
    shape: torch.Size
    dtype: torch.dtype
    start: int
    bytes: int


class PackedLayer:
    """How the tensors of one layer lie in a block of bytes.

    Args:
        layer: its parameters and buffers, those inside of quantized ones too. Tensors that are one (a scale under two
            names) are packed once.
    """

    def __init__(self, layer: nn.Module) -> None:
        places: dict[tuple[int, torch.dtype, torch.Size], list[TensorPlace]] = {}
        for place in places_of(layer):
            tensor = place.get()
            places.setdefault((tensor.data_ptr(), tensor.dtype, tensor.shape), []).append(place)
        parts, end = [], 0
        for (_, dtype, shape), same in places.items():
            size = shape.numel() * dtype.itemsize
            parts.append(_Part(tuple(same), shape, dtype, end, size))
            end += -(-size // ALIGNMENT) * ALIGNMENT
        self._parts = tuple(parts)
        self.bytes = end

    def copy_to(self, block: torch.Tensor) -> None:
        """Copy the layer's tensors into `block`, uint8 [at least `bytes`], on any device."""
        for part in self._parts:
            self._view(block, part).copy_(part.places[0].get())

    def point_to(self, block: torch.Tensor) -> None:
        """Make the layer's tensors views of `block`, uint8 [at least `bytes`]; their values are what it holds."""
        for part in self._parts:
            view = self._view(block, part)
            for place in part.places:
                place.put(view)

    @staticmethod
    def _view(block: torch.Tensor, part: _Part) -> torch.Tensor:
        return block[part.start : part.start + part.bytes].view(part.dtype).view(part.shape)


def places_of(layer: nn.Module) -> Iterator[TensorPlace]:
    """Where a layer keeps its tensors; a quantized one counts as its parts."""
    for module in layer.modules():
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None:
                yield from _inner_places(TensorPlace(module, name))


def _inner_places(place: TensorPlace) -> Iterator[TensorPlace]:
    tensor = place.get()
    if not is_traceable_wrapper_subclass(tensor):
        yield place
        return
    # Nested, because a parameter may wrap a quantized tensor, which wraps others.
    for name in tensor.__tensor_flatten__()[0]:
        yield from _inner_places(TensorPlace(tensor, name))
