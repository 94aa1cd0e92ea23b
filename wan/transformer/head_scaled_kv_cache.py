"""A KV cache in e4m3fn with one scale per layer and head, which 8-bit attention reads as it is.

Keys and values are rounded once, when a pass writes them, instead of in each pass that reads them. So a head's scale
must hold for all tokens of the cache: it is fixed by the pass that begins at the cache's front, which under `recompute`
is each block's context, with a margin of 16 for what comes later (`scale_with_margin`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from ...ops.fp8_linear import FP8_DTYPE
from ...ops.head_quantization import HeadScales, unround_heads
from .kv_cache import KVCache, move_tokens

_WIDE_DTYPES = ("bfloat16", "float16", "float32")


@dataclass
class HeadScaledKVCache(KVCache):
    """See the module. `keys` and `values` are float8_e4m3fn.

    Attributes:
        scales: of each layer; written by the passes that begin at the front.
        wide_dtype: name of the model's dtype.
    """

    scales: list[HeadScales] = field(default_factory=list)
    wide_dtype: str = "bfloat16"

    @classmethod
    def with_scales(cls, cache: KVCache, wide_dtype: torch.dtype) -> HeadScaledKVCache:
        """An empty cache in e4m3fn, taken over, and scales that no pass has found yet; for a model in `wide_dtype`."""
        scales = [HeadScales.allocate(key.shape[2], key.device) for key in cache.keys]
        return cls(**vars(cache), scales=scales, wide_dtype=str(wide_dtype).removeprefix("torch."))

    @property
    def layer_bytes(self) -> int:
        """Bytes that one layer more would take."""
        return super().layer_bytes + sum(scale.nbytes for scale in self.scales[0])

    def pop_layer(self) -> tuple[torch.Tensor, torch.Tensor]:
        """See `KVCache`."""
        dtype, scales = getattr(torch, self.wide_dtype), self.scales.pop(0)
        key, value = super().pop_layer()
        return unround_heads(key, scales.key, dtype), unround_heads(value, scales.value, dtype)

    @classmethod
    def from_snapshot(cls, parts: Mapping[str, Any], device: torch.device) -> HeadScaledKVCache:
        """The same cache on `device`; raises ValueError where its keys have no such scales, as a file may say."""
        scales = [HeadScales(*(scale.to(device, copy=True) for scale in layer)) for layer in parts["scales"]]
        _check_scales(scales, parts)
        made = super().from_snapshot({**parts, "scales": scales}, device)
        assert isinstance(made, HeadScaledKVCache)
        return made

    def _stored(self, sink: int, first_kept: int) -> dict[str, Any]:
        return super()._stored(sink, first_kept) | {"scales": [list(layer) for layer in self.scales]}

    def _move_kept(self, first_kept: int, target: int) -> None:
        # As bytes: not every device copies 8-bit floats into a part of a tensor.
        for buffer in (*self.keys, *self.values):
            move_tokens(buffer.view(torch.uint8), first_kept, self.length, target)


def _check_scales(scales: list[HeadScales], parts: Mapping[str, Any]) -> None:
    """A kernel reads as many scales as there are heads, whatever there is."""
    heads = [(buffer[0].dtype, buffer[0].shape[2]) for name in ("keys", "values") for buffer in parts[name]]
    wanted = (FP8_DTYPE, scales[0].query.shape[1])
    shape = (1, wanted[1])
    if len(scales) != len(parts["keys"]) or any(found != wanted for found in heads):
        raise ValueError("keys of other layers, heads or bits than the scales are for")
    if any(scale.dtype != torch.float32 or tuple(scale.shape) != shape for layer in scales for scale in layer):
        raise ValueError("scales that are no float32 of each head")
    if parts["wide_dtype"] not in _WIDE_DTYPES:
        raise ValueError("a dtype that no model has")
