"""A KV cache that keeps the past in 8 bits, and each layer's keys and values of now in one buffer that all share.

The past of a layer is e4m3fn with a scale per token and head. Before a layer attends, its past is written to the shared
buffer in the model's dtype; the block being denoised is only ever there, exact, because every pass writes it again. A
pass whose keys are kept packs them when the layer is done. Both happen inside the layer's own call, outside its
compiled part, so no kernel and no graph sees 8 bits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from ...ops.fp8_linear import FP8_DTYPE, fp8_scale, largest_magnitude, round_to_fp8
from .kv_cache import KVCache, fill_buffer, pieces_of


class PackedTokens(NamedTuple):
    """Keys or values of one layer in 8 bits.

    Attributes:
        data: e4m3fn [1, tokens, heads, head_dim].
        scale: float32 [1, tokens, heads, 1].
    """

    data: torch.Tensor
    scale: torch.Tensor

    @classmethod
    def allocate(cls, tokens: int, heads: int, head_dim: int, device: torch.device) -> PackedTokens:
        """Room for so many tokens."""
        return cls(
            torch.zeros((1, tokens, heads, head_dim), dtype=FP8_DTYPE, device=device),
            torch.zeros((1, tokens, heads, 1), dtype=torch.float32, device=device),
        )

    def unpack_to(self, buffer: torch.Tensor, tokens: int) -> None:
        """Write the first tokens to the front of `buffer` [1, capacity, heads, head_dim], in its dtype."""
        front = buffer[:, :tokens]
        front.copy_(self.data[:, :tokens])
        front.mul_(self.scale[:, :tokens])

    def pack_from(self, buffer: torch.Tensor, start: int, end: int) -> None:
        """Take tokens `start` to `end` of `buffer`, to the same places."""
        values = buffer[:, start:end]
        scale = fp8_scale(largest_magnitude(values, "per row"))
        self.scale[:, start:end] = scale
        # As bytes: not every device copies e4m3fn into a part of a tensor.
        self.data[:, start:end].view(torch.uint8).copy_(round_to_fp8(values, scale).view(torch.uint8))

    def move(self, start: int, end: int, target: int) -> None:
        """Move tokens `start` to `end` to the places from `target` on."""
        for part in (self.data.view(torch.uint8), self.scale):
            # Cloned: source and target overlap.
            part[:, target : target + end - start] = part[:, start:end].clone()


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
        kept_frames: int,
        tokens_per_frame: int,
        sink_frames: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> PackedKVCache:
        """Allocate room for `frames` latent frames (context and current block), of which `kept_frames` are packed.

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
        room = kept_frames * tokens_per_frame

        def make() -> PackedTokens:
            return PackedTokens.allocate(room, heads, head_dim, device)

        packed = [(make(), make()) for _ in range(layers)]
        return cls(one.keys * layers, one.values * layers, tokens_per_frame, sink_tokens=one.sink_tokens, packed=packed)

    @property
    def layer_bytes(self) -> int:
        """Bytes that one layer more would take: the buffers are shared."""
        return sum(tensor.nbytes for tokens in self.packed[0] for tensor in tokens)

    def packed_past(self, layer: int, kept: int) -> PackedPast:
        """What the call of a layer does around its attention; `kept` tokens of the pass are packed."""
        keys, values = self.packed[layer]
        return PackedPast(keys, values, (self.keys[layer], self.values[layer]), self.length, kept)

    @classmethod
    def from_snapshot(cls, parts: Mapping[str, Any], device: torch.device) -> PackedKVCache:
        """The same cache on `device`. The shared buffers come empty: each layer writes them before it reads them."""
        own = ("capacity", "heads", "head_dim", "dtype", "kept_tokens", "packed")
        known = {name: part for name, part in parts.items() if name not in own}
        shape = (1, parts["capacity"], parts["heads"], parts["head_dim"])
        dtype = getattr(torch, parts["dtype"])
        one, other = (torch.zeros(shape, dtype=dtype, device=device) for _ in range(2))

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
