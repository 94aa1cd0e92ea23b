"""What directs a stream from outside: prompts, pictures and a stream to go on from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from .block_prompt import BlockPrompt
from .prompt_track import PlacedTrack


@dataclass(frozen=True)
class Direction:
    """What a stream shows, block by block.

    Attributes:
        prompt_of: from block index to prompt, or to several mixed.
        embeds: of the prompt, [1, text tokens, text width], zero where nothing is said; every block is made with them
            and `prompt_of` is not asked. None encodes the prompts.
        ahead: prompts that are known beforehand and encoded before the first block.
        is_mixed: whether any block mixes prompts.
    """

    prompt_of: Callable[[int], str | BlockPrompt]
    embeds: torch.Tensor | None = None
    ahead: Sequence[str] = ()
    is_mixed: bool = False

    @classmethod
    def constant(cls, prompt: str) -> Direction:
        """The same prompt for every block."""
        return cls(lambda _: prompt)

    @classmethod
    def along(cls, track: PlacedTrack) -> Direction:
        """The prompts of a track."""
        return cls(track.at, ahead=track.texts, is_mixed=track.is_mixed)
