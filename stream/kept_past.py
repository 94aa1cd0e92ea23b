"""What a session keeps of its past for snapshots, and makes anew of one."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from typing import Any

import torch

from .carried_state import DECODED_LATENTS, DECODER_CACHE
from .decoded_latents import DecodedLatents
from .last_block import LastBlock
from .settings import StreamSettings
from .stream_pipeline import StreamPipeline


class KeptPast:
    """The latents decoded last, and what the last block left.

    Args:
        pipeline: of the session.
        keeps: whether anything is kept.
        begins: whether the decoder has decoded nothing before.
    """

    def __init__(self, pipeline: StreamPipeline, *, keeps: bool, begins: bool) -> None:
        self._pipeline = pipeline
        self._decoded = DecodedLatents() if keeps else None
        if self._decoded is not None and not begins:
            self._decoded.begin_with(None)
        self._to_decode_again: torch.Tensor | None = None
        self._noted: LastBlock | None = None

    def take_up(self, state: MutableMapping[str, Any]) -> None:
        """Take the latents of a snapshot out of the state that it was put into."""
        decoded = state.pop(DECODED_LATENTS, None)
        if DECODER_CACHE not in state:
            self._to_decode_again = decoded
        self.begin_with(decoded)

    def begin_with(self, decoded: torch.Tensor | None) -> None:
        """The decoder is as `decoded`, [1, channels, frames, height, width], leaves it; None for what nobody knows."""
        if self._decoded is not None:
            self._decoded.begin_with(decoded)

    def make_decoder(self, settings: StreamSettings) -> dict[str, Any]:
        """State entries in the place of those that the snapshot lacked; the components are on the device."""
        decoded = self._to_decode_again
        made = {} if decoded is None else self._pipeline.decode_again(decoded, settings)
        # Only now: without the memory for it, it is called again.
        self._to_decode_again = None
        return made

    def begin_afresh(self) -> None:
        """Nothing of before counts."""
        self._decoded = None if self._decoded is None else DecodedLatents()
        self._to_decode_again = self._noted = None

    def block_made(self, state: Mapping[str, Any], frames: int) -> None:
        """Keep the latents of a block of so many frames."""
        if self._decoded is None:
            return
        reach = self._pipeline.decoder_reach()
        latents = state.get("current_denoised_latents")
        if reach is None or not isinstance(latents, torch.Tensor):
            # Blocks of a repository: what they decode is unknown.
            self._decoded = None
        else:
            self._decoded.add(latents[:, :, -frames:], reach)

    def entries(self, *, lean: bool) -> dict[str, Any]:
        """Entries of a snapshot beside those of the state, or in their place."""
        decoded = None if self._decoded is None else self._decoded.joined()
        if decoded is None:
            return {}
        return {DECODED_LATENTS: decoded} | ({DECODER_CACHE: None} if lean else {})

    def note(self, carried: Mapping[str, Any], *, prompt: str, blocks_made: int, scene_began: int) -> None:
        """Note what the last block left; see `LastBlock.note`."""
        if self._decoded is not None:
            self._noted = LastBlock.note(
                carried, self._decoded, prompt=prompt, blocks_made=blocks_made, scene_began=scene_began
            )

    def follow_keys(self, state: Mapping[str, Any]) -> None:
        """The state is again what was noted, perhaps with its keys packed, which has used up those of before."""
        if self._noted is not None:
            self._noted = self._noted.with_keys(state)

    @property
    def noted(self) -> LastBlock:
        """What the last block left; raises ValueError where that was not noted."""
        if self._noted is None:
            raise ValueError("no block of the stream was noted")
        return self._noted

    def drop(self) -> None:
        """Hold nothing any more."""
        self._decoded = self._to_decode_again = self._noted = None
