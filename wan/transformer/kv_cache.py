"""Preallocated key/value caches of the causal transformer.

Layout of one layer of the self-attention cache, in tokens (a latent frame is `tokens_per_frame` of them):

    [ sink | past frames, oldest first | block being denoised | free ]
      0..sink        ..length            ..length + block       ..capacity

Keys are stored after RoPE. Protocol per block: `begin_block` once (makes room by dropping the oldest past
frames after the sink), then any number of passes that each write the block's slots again (`write_block`, layer
by layer), then, where the policy keeps them, `commit`. A block whose keys are to be kept can be `deferred`: they
are written, and committed, along with the next block's first pass, which sees them in its `next_window`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple

import torch

from ...ops.fp8_linear import FP8_DTYPE
from ...ops.token_copies import copy_in_a_row, write_tokens
from .rope import RotaryTables

_BUFFERS = ("keys", "values")
# Of a snapshot, which may come from anywhere: no window of a stream is as long.
_MOST_TOKENS = 2**24
# Of a snapshot: buffers are stored as far as they are filled, and RoPE tables are computed again.
_STORED_APART = frozenset({*_BUFFERS, "packed", "rotary"})


@dataclass(frozen=True)
class DeferredBlock:
    """A denoised block whose keys at t = 0 are still to be written, with all that its pass needs besides the cache.

    Attributes:
        latents: [1, channels, latent frames, height, width].
        frame_offset: RoPE position of its first latent frame.
        prompt: that it was made with.
        prompt_embeds: of that prompt, [1, text tokens, text_dim].
    """

    latents: torch.Tensor
    frame_offset: int
    prompt: str
    prompt_embeds: torch.Tensor

    def to_snapshot(self) -> dict[str, Any]:
        """All of it."""
        return dict(vars(self))

    @classmethod
    def from_snapshot(cls, parts: Mapping[str, Any], device: torch.device) -> DeferredBlock:
        """The same block on `device`."""
        copied = {name: parts[name].to(device, copy=True) for name in ("latents", "prompt_embeds")}
        return cls(**{**parts, **copied})


class NextWindow(NamedTuple):
    """What a block sees of a cache whose newest tokens are written in the block's own pass.

    Attributes:
        sink: tokens at the front that it sees.
        dropped: tokens after these that it no longer sees; it sees all later ones.
        packs: in which dtype of 8 bits the newest, which it sees so, will be stored; None for their own.
    """

    sink: int
    dropped: int
    packs: torch.dtype | None = None


@dataclass
class KVCache:
    """Self-attention keys and values of every layer.

    Attributes:
        keys: per layer [batch, capacity tokens, heads, head_dim].
        values: per layer, the same shape.
        tokens_per_frame: patches of one latent frame.
        sink_tokens: tokens at the front that are never evicted.
        length: tokens of past frames that are valid.
        evicted: tokens that were dropped so far.
        deferred: the block whose tokens come after the past frames, and whose keys are still to be written.
        room: tokens of the last block that began.
        rotary: RoPE tables of the positions in time at which keys were last written.
    """

    keys: list[torch.Tensor]
    values: list[torch.Tensor]
    tokens_per_frame: int
    sink_tokens: int = 0
    length: int = 0
    evicted: int = 0
    deferred: DeferredBlock | None = None
    room: int = 0
    rotary: RotaryTables = field(default_factory=RotaryTables)

    @classmethod
    def allocate(
        cls,
        *,
        layers: int,
        heads: int,
        head_dim: int,
        frames: int,
        tokens_per_frame: int,
        sink_frames: int = 0,
        device: torch.device,
        dtype: torch.dtype,
    ) -> KVCache:
        """Allocate room for `frames` latent frames (context and current block together).

        Raises:
            ValueError: the sink leaves no room for other frames.
        """
        if sink_frames < 0 or sink_frames >= frames:
            raise ValueError(f"sink_frames is {sink_frames}: choose 0 to {frames - 1} for a window of {frames}.")
        shape = (1, frames * tokens_per_frame, heads, head_dim)
        return cls(
            keys=[torch.zeros(shape, device=device, dtype=dtype) for _ in range(layers)],
            values=[torch.zeros(shape, device=device, dtype=dtype) for _ in range(layers)],
            tokens_per_frame=tokens_per_frame,
            sink_tokens=sink_frames * tokens_per_frame,
        )

    @property
    def capacity(self) -> int:
        """Tokens each layer has room for."""
        return self.keys[0].shape[1]

    @property
    def layer_bytes(self) -> int:
        """Bytes that one layer more would take."""
        return self.keys[0].nbytes + self.values[0].nbytes

    def remember(self, way: object = None) -> Callable[[], bool]:
        """Note the past frames; the returned function forgets what was committed since. What was evicted stays so.

        And a block that was deferred and is written by then stays written: what its pass saw may be evicted. It takes
        no memory, whatever `way` allows.
        """
        length, evicted, deferred = self.length, self.evicted, self.deferred

        def rewind() -> bool:
            written = 0
            if deferred is not None and self.deferred is not deferred:
                written = deferred.latents.shape[2] * self.tokens_per_frame
            self.deferred = None if written else deferred
            self.length = length + written - (self.evicted - evicted)
            return True

        return rewind

    def of_all_layers(self) -> dict[str, Any]:
        """What a cache of another kind with the same past has too."""
        names = (known.name for known in fields(KVCache) if known.name not in _BUFFERS)
        return {name: getattr(self, name) for name in names}

    def pop_layer(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Take the first layer's keys and values out, in the model's dtype."""
        return self.keys.pop(0), self.values.pop(0)

    def reset(self) -> None:
        """Drop every past frame; the memory stays allocated."""
        self.length = 0
        self.deferred = None

    def begin_block(self, tokens: int) -> None:
        """Make room for a block of `tokens` tokens after the past frames.

        Raises:
            ValueError: sink and block together are larger than the cache.
        """
        if self.sink_tokens + tokens > self.capacity:
            raise ValueError(
                f"a block of {tokens} tokens and a sink of {self.sink_tokens} do not fit a KV cache of "
                f"{self.capacity} tokens: use fewer sink frames or more context frames."
            )
        self.room = tokens
        surplus = self._surplus(tokens)
        if surplus > 0:
            self._drop_oldest(surplus)

    def next_window(self, written: int, tokens: int) -> NextWindow:
        """What `begin_block` would leave for a block of `tokens` tokens after the next `written` ones."""
        return NextWindow(self.sink_tokens, max(0, self._surplus(written + tokens)))

    def check_pass(self, tokens: int, heads: int, head_dim: int) -> None:
        """Raise ValueError unless a pass of such heads can write `tokens` tokens after the past: kernels do not look.

        The cache of a stream that goes on may come from a file, which may say anything.
        """
        shape = (1, self.capacity, heads, head_dim)
        fits = all(buffer.shape == shape for buffer in (*self.keys, *self.values))
        if not (fits and 0 <= self.length <= self.capacity - tokens):
            raise ValueError(
                f"kv_cache holds {self.length} of {self.capacity} tokens in heads of {tuple(self.keys[0].shape[2:])}, "
                f"and a pass writes {tokens} more of {(heads, head_dim)}: start a new stream."
            )

    def commit(self, tokens: int) -> None:
        """Count the block's tokens, as last written, among the past frames; if it was deferred, it no longer is."""
        self.length += tokens
        self.deferred = None

    def _surplus(self, tokens: int) -> int:
        return self.length + tokens - self.capacity

    def to_snapshot(self) -> dict[str, Any]:
        """Sizes, and the tokens that stay when the next block, as long as the last, begins."""
        # The clean pass of a deferred block sees all that its block saw.
        surplus = max(0, self._surplus(self.room)) if self.deferred is None else 0
        # Whatever else the cache comes to hold is part of it, or refused: never forgotten without a word.
        known = {name: value for name, value in vars(self).items() if name not in _STORED_APART}
        known |= {"capacity": self.capacity, "length": self.length - surplus, "evicted": self.evicted + surplus}
        return known | self._stored(self.sink_tokens, self.sink_tokens + surplus)

    @classmethod
    def from_snapshot(cls, parts: Mapping[str, Any], device: torch.device) -> KVCache:
        """The same cache on `device`; where it had no tokens, zeros."""
        known = {name: part for name, part in parts.items() if name not in ("capacity", "keys", "values")}
        keys, values = ([fill_buffer(pieces, parts["capacity"], device) for pieces in parts[n]] for n in _BUFFERS)
        return cls(keys, values, **known)

    def _stored(self, sink: int, first_kept: int) -> dict[str, Any]:
        """Per layer, the pieces of what is kept: tokens before `sink`, and from `first_kept` to the last."""
        return {
            name: [pieces_of(buffer, sink, first_kept, self.length) for buffer in getattr(self, name)]
            for name in _BUFFERS
        }

    def _drop_oldest(self, surplus: int) -> None:
        self._move_kept(self.sink_tokens + surplus, self.sink_tokens)
        self.length -= surplus
        self.evicted += surplus

    def _move_kept(self, first_kept: int, target: int) -> None:
        for buffer in (*self.keys, *self.values):
            move_tokens(buffer, first_kept, self.length, target)


def move_tokens(buffer: torch.Tensor, start: int, end: int, target: int) -> None:
    """Move tokens `start` to `end` of `buffer` [batch, tokens, ...] towards its front, to the places from `target` on.

    A piece at a time, none longer than the way, so that nothing overlaps and nothing is allocated: a device that runs
    out of memory between two layers would leave a cache that is half moved.
    """
    way = start - target
    for place in range(start, end, way):
        piece = buffer[:, place : min(place + way, end)]
        buffer[:, place - way : place - way + piece.shape[1]].copy_(piece)


def pieces_of(buffer: torch.Tensor, sink: int, first_kept: int, length: int) -> list[torch.Tensor]:
    """Views of `buffer` [batch, tokens, ...]: tokens before `sink`, and from `first_kept` to `length`."""
    if first_kept == sink:
        return [buffer[:, :length]]
    return [piece for piece in (buffer[:, :sink], buffer[:, first_kept:length]) if piece.shape[1]]


def fill_buffer(pieces: Sequence[torch.Tensor], capacity: int, device: torch.device) -> torch.Tensor:
    """A buffer for `capacity` tokens on `device` that begins with `pieces`, each [batch, tokens, ...].

    Raises ValueError where the pieces, which a file may hold, do not fit into it, or it is larger than any window.
    """
    like, held = pieces[0], sum(piece.shape[1] for piece in pieces)
    if type(capacity) is not int or not held <= capacity <= _MOST_TOKENS:
        raise ValueError(f"a cache of {capacity} tokens, of which {held} are held")
    buffer = torch.zeros((like.shape[0], capacity, *like.shape[2:]), dtype=like.dtype, device=device)
    copy_in_a_row(buffer, pieces)
    return buffer


def write_block(keys: torch.Tensor, values: torch.Tensor, past: int, key: torch.Tensor, value: torch.Tensor) -> None:
    """Store one layer of the current block.

    Takes one layer's buffers rather than the cache and an index: each index would trigger recompilation.

    Args:
        keys: the layer's buffer [batch, capacity tokens, heads, head_dim].
        values: the same for values.
        past: tokens of past frames before the block.
        key: [batch, block tokens, heads, head_dim], after RoPE; cast to the buffer's dtype as it is copied.
        value: the same shape.
    """
    if torch.compiler.is_compiling() or keys.dtype == FP8_DTYPE:
        # Inductor, which looks into copies, compiles them for a past of 0 and again for all others.
        write_tokens(keys, past, key.to(keys.dtype))
        write_tokens(values, past, value.to(values.dtype))
        return
    end = past + key.shape[1]
    keys[:, past:end].copy_(key)
    values[:, past:end].copy_(value)
