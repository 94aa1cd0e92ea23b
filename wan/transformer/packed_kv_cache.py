"""A KV cache that keeps the past in 8 bits, and each layer's keys and values of now in one buffer that all share.

The past of a layer is INT8 or e4m3fn with a scale per token and head. Before a layer attends, its past is written to
the shared buffer in the model's dtype; the block being denoised is only ever there, exact, because every pass writes it
again. A pass whose keys are kept packs them when the layer is done. Both happen inside the layer's own call, outside
its compiled part, so no kernel and no graph sees 8 bits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from .eight_bits import PackedTokens, Packing
from .kv_cache import KVCache, NextWindow, fill_buffer, pieces_of


class PackedPast(NamedTuple):
    """What a layer's call does around its attention.

    Attributes:
        keys: packed.
        values: packed.
        buffers: the shared ones of keys and values.
        past: tokens that the layer attends to before those of the pass.
        kept: tokens of the pass that are packed afterwards; 0 for none.
    """

    keys: PackedTokens
    values: PackedTokens
    buffers: tuple[torch.Tensor, torch.Tensor]
    past: int
    kept: int

    def unpack(self) -> None:
        """Bring the layer's past into the shared buffers."""
        if self.past:
            self.keys.unpack_to(self.buffers[0], self.past)
            self.values.unpack_to(self.buffers[1], self.past)

    def pack(self) -> None:
        """Keep what the layer has written to the shared buffers."""
        if self.kept:
            self.keys.pack_from(self.buffers[0], self.past, self.past + self.kept)
            self.values.pack_from(self.buffers[1], self.past, self.past + self.kept)


@dataclass
class PackedKVCache(KVCache):
    """See the module. `keys` and `values` are the shared buffers, once per layer.

    Attributes:
        packed: keys and values of each layer.
    """

    packed: list[tuple[PackedTokens, PackedTokens]] = field(default_factory=list)

    @classmethod
    def allocate_packed(
        cls,
        *,
        layers: int,
        heads: int,
        head_dim: int,
        frames: int,
        packing: Packing,
        tokens_per_frame: int,
        sink_frames: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> PackedKVCache:
        """Allocate room for `frames` latent frames (context and current block), of which some are packed.

        Raises:
            ValueError: the sink leaves no room for other frames.
        """
        one = KVCache.allocate(
            layers=1,
            heads=heads,
            head_dim=head_dim,
            frames=frames,
            tokens_per_frame=tokens_per_frame,
            sink_frames=sink_frames,
            device=device,
            dtype=dtype,
        )
        room = packing.frames * tokens_per_frame

        def make() -> PackedTokens:
            return PackedTokens.allocate(room, heads, head_dim, device, packing.dtype)

        packed = [(make(), make()) for _ in range(layers)]
        return cls(one.keys * layers, one.values * layers, tokens_per_frame, sink_tokens=one.sink_tokens, packed=packed)

    @classmethod
    def take_over(cls, cache: KVCache, packing: Packing) -> PackedKVCache:
        """The same past in 8 bits. Layers leave `cache` one by one, so hardly any memory is needed, and it is used up.

        Raises:
            ValueError: the past is longer than what is packed.
        """
        room = packing.frames * cache.tokens_per_frame
        if cache.length > room:
            raise ValueError(f"the KV cache holds {cache.length} tokens, and {room} are packed: pack more frames.")
        _, _, heads, head_dim = cache.keys[0].shape
        device, layers = cache.keys[0].device, len(cache.keys)
        packed: list[tuple[PackedTokens, PackedTokens]] = []
        known = cache.of_all_layers()
        # Those of the last layer become the shared buffers.
        key = value = cache.keys[0]
        while cache.keys:
            key, value = cache.pop_layer()
            one = [PackedTokens.allocate(room, heads, head_dim, device, packing.dtype) for _ in range(2)]
            if cache.length:
                one[0].pack_from(key, 0, cache.length)
                one[1].pack_from(value, 0, cache.length)
            packed.append((one[0], one[1]))
        return cls([key] * layers, [value] * layers, packed=packed, **known)

    @property
    def layer_bytes(self) -> int:
        """Bytes that one layer more would take: the buffers are shared."""
        return sum(tensor.nbytes for tokens in self.packed[0] for tensor in tokens)

    def next_window(self, written: int, tokens: int) -> NextWindow:
        """See `KVCache`."""
        return super().next_window(written, tokens)._replace(packs=self.packed[0][0].data.dtype)

    def packed_past(self, layer: int, kept: int) -> PackedPast:
        """What the call of a layer does around its attention; `kept` tokens of the pass are packed."""
        keys, values = self.packed[layer]
        return PackedPast(keys, values, (self.keys[layer], self.values[layer]), self.length, kept)

    @classmethod
    def from_snapshot(cls, parts: Mapping[str, Any], device: torch.device) -> PackedKVCache:
        """The same cache on `device`. The shared buffers come empty: each layer writes them before it reads them."""
        own = ("capacity", "heads", "head_dim", "dtype", "kept_tokens", "packed")
        known = {name: part for name, part in parts.items() if name not in own}
        like = torch.empty(1, 0, parts["heads"], parts["head_dim"], dtype=getattr(torch, parts["dtype"]))
        one, other = (fill_buffer([like], parts["capacity"], device) for _ in range(2))

        def restored(tokens: Sequence[Sequence[torch.Tensor]]) -> PackedTokens:
            return PackedTokens(*(fill_buffer(pieces, parts["kept_tokens"], device) for pieces in tokens))

        packed = [(restored(keys), restored(values)) for keys, values in parts["packed"]]
        return cls([one] * len(packed), [other] * len(packed), packed=packed, **known)

    def _stored(self, sink: int, first_kept: int) -> dict[str, Any]:
        buffer = self.keys[0]
        return {
            "heads": buffer.shape[2],
            "head_dim": buffer.shape[3],
            "dtype": str(buffer.dtype).removeprefix("torch."),
            "kept_tokens": self.packed[0][0].data.shape[1],
            "packed": [
                [[pieces_of(part, sink, first_kept, self.length) for part in tokens] for tokens in layer]
                for layer in self.packed
            ],
        }

    def _move_kept(self, first_kept: int, target: int) -> None:
        for keys, values in self.packed:
            for tokens in (keys, values):
                tokens.move(first_kept, self.length, target)
