"""What a stream was behind its last whole block, while the next one is made and may fail."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..memory.way_back import FREE_WAY_BACK
from .carried_state import DECODED_LATENTS, DECODER_CACHE
from .decoded_latents import DecodedLatents
from .state import Rewindable, Snapshottable

_KEYS = "kv_cache"


@dataclass(frozen=True)
class LastBlock:
    """References to what the next block replaces, and how to undo what it writes over; no copies of tensors.

    Attributes:
        entries: of the state, as a lean snapshot has them, without keys and values.
        decoded: the latents that stand for the decoder's cache.
        keys: the cache of keys and values, which the next block changes in place; None where none is carried.
        rewind: makes `keys` what it was; False where it cannot.
        is_known: False where an entry may have changed in place unnoticed.
        prompt: of the block.
        blocks_made: since the stream's first frame, over all sessions.
        scene_began: see `StreamSnapshot`.
    """

    entries: Mapping[str, Any]
    decoded: DecodedLatents
    keys: Any
    rewind: Callable[[], bool]
    is_known: bool
    prompt: str
    blocks_made: int
    scene_began: int

    @classmethod
    def note(
        cls,
        carried: Mapping[str, Any],
        decoded: DecodedLatents,
        *,
        prompt: str,
        blocks_made: int,
        scene_began: int,
    ) -> LastBlock:
        """Note a stream between two blocks.

        Args:
            carried: entries of its state that the next block needs, the generator among them.
            decoded: where they are not whole, the decoder's cache would have to be copied.
            prompt: of the last block.
            blocks_made: see the class.
            scene_began: see the class.
        """
        keys = carried.get(_KEYS)
        left = {name: value for name, value in carried.items() if name not in (_KEYS, DECODER_CACHE, DECODED_LATENTS)}
        known = decoded.is_whole and not any(isinstance(value, Snapshottable) for value in left.values())
        rewind = _undo(keys) if keys is not None else lambda: True
        entries = {name: _held(value) for name, value in left.items()}
        return cls(entries, decoded.copy(), keys, rewind, known, prompt, blocks_made, scene_began)

    def with_keys(self, state: Mapping[str, Any]) -> LastBlock:
        """The same with the keys that `state` has now, if it has others: of the same past."""
        keys = state.get(_KEYS)
        if self.keys is None or keys is None or keys is self.keys:
            return self
        return replace(self, keys=keys, rewind=_undo(keys))

    def restored(self) -> dict[str, Any]:
        """The entries of then.

        Raises:
            ValueError: the block that failed has changed what cannot be undone.
        """
        if not self.is_known or not self.rewind():
            raise ValueError("the block that failed has changed what the one before it left")
        keys = {} if self.keys is None else {_KEYS: self.keys}
        return {**self.entries, **keys, DECODED_LATENTS: self.decoded.joined()}


def _held(value: Any) -> Any:  # noqa: ANN401
    if isinstance(value, deque):
        return deque(value, value.maxlen)
    if isinstance(value, torch.Generator):
        other = torch.Generator(value.device)
        other.set_state(value.get_state())
        return other
    return value


def _undo(keys: Any) -> Callable[[], bool]:  # noqa: ANN401
    # Keys of a deferred block that the next one's first pass has written differ by rounding from those it would write.
    deferred = getattr(keys, "deferred", None)
    rewind = keys.remember(FREE_WAY_BACK) if isinstance(keys, Rewindable) else lambda: False
    return lambda: (deferred is None or keys.deferred is deferred) and rewind()
