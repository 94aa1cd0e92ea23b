"""What directs a stream from outside: prompts, pictures and a stream to go on from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .block_prompt import BlockPrompt
from .conditioning import GIVEN_PROMPT
from .placed_track import PlacedTrack
from .snapshot import StreamSnapshot
from .start_pictures import StartPictures
from .video_input import VideoInput


@dataclass(frozen=True)
class Direction:
    """What a stream shows, block by block.

    Attributes:
        prompt_of: from block index to prompt, or to several mixed.
        embeds: of the prompt, [1, text tokens, text width], zero where nothing is said; every block is made with them
            and `prompt_of` is not asked. None encodes the prompts.
        track: where `prompt_of` comes from, if the track has prompts, which are encoded before the first block; it may
            say the attention bias of blocks, too.
        go_on: the stream that this one continues; its blocks are not counted by `prompt_of`. None starts a new one.
        start: pictures that the stream goes on from; None starts with nothing.
        video: what each block is made from; None makes each from noise.
    """

    prompt_of: Callable[[int], str | BlockPrompt]
    embeds: torch.Tensor | None = None
    track: PlacedTrack | None = None
    go_on: StreamSnapshot | None = None
    start: StartPictures | None = None
    video: VideoInput | None = None

    @classmethod
    def constant(cls, prompt: str) -> Direction:
        """The same prompt for every block."""
        return cls(lambda _: prompt)

    @classmethod
    def of(
        cls,
        prompt: str,
        embeds: torch.Tensor | None = None,
        track: PlacedTrack | None = None,
        go_on: StreamSnapshot | None = None,
        start: StartPictures | None = None,
        video: VideoInput | None = None,
    ) -> Direction:
        """The prompts of a track, if it has any, or else embeddings, or else the same prompt for every block."""
        if track is not None and track.has_prompts:
            return cls(track.at, None, track, go_on, start, video)
        return cls(lambda _: prompt, embeds, track, go_on, start, video)

    @property
    def prompts_ahead(self) -> Sequence[str]:
        """Prompts that are known beforehand and encoded before the first block."""
        return () if self.track is None else self.track.texts

    @property
    def is_mixed(self) -> bool:
        """Whether any block mixes prompts."""
        return self.track is not None and self.track.is_mixed

    @property
    def least_bias(self) -> float | None:
        """The smallest attention bias that the track says; None where it says none."""
        return None if self.track is None or not self.track.has_bias else self.track.least_bias

    def inputs_of(self, block: int, attention_bias: float) -> dict[str, float]:
        """Inputs of the pipeline's call that the track says for a block; `attention_bias` where it does not say."""
        if self.track is None or not self.track.has_bias:
            return {}
        return {"attention_bias": self.track.bias_at(block, attention_bias)}

    def describe(self) -> dict[str, Any]:
        """What was shown, for text output: under a track, its prompts by blocks."""
        if self.track is not None and self.track.has_prompts:
            return {"prompt": "(from the track)", "track": self.track.describe()}
        return {"prompt": self.prompt_of(0) if self.embeds is None else GIVEN_PROMPT}
