"""What directs a stream from outside: prompts, pictures and a stream to go on from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import torch

from .block_prompt import LINEAR, BlockPrompt
from .conditioning import GIVEN_PROMPT
from .live_control import Edit
from .live_video import LiveVideo
from .placed_track import PlacedTrack
from .prompt_track import PromptTrack
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
    video: VideoInput | LiveVideo | None = None

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
        video: VideoInput | LiveVideo | None = None,
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

    def name_of(self, block: int) -> str | None:
        """What a block shows, as a line; None where embeddings are given."""
        return None if self.embeds is not None else BlockPrompt.of(self.prompt_of(block)).name

    def strength_of(self, block: int) -> float | None:
        """How much of the video a block replaces, 0..1; None without a video."""
        if self.video is None or self.track is None:
            return None if self.video is None else self.video.strength
        return self.track.strength_at(block, self.video.strength)

    def bias_of(self, block: int, attention_bias: float) -> float:
        """The attention bias of a block; `attention_bias` where the track does not say."""
        return attention_bias if self.track is None else self.track.bias_at(block, attention_bias)

    def inputs_of(self, block: int, attention_bias: float) -> dict[str, float]:
        """Inputs of the pipeline's call that the track says for a block; `attention_bias` where it does not say."""
        if self.track is None or not self.track.has_bias:
            return {}
        return {"attention_bias": self.bias_of(block, attention_bias)}

    def as_track(self) -> PlacedTrack:
        """All that a track can say of it; no prompts, where embeddings are given."""
        if self.track is not None and (self.track.has_prompts or self.embeds is not None):
            return self.track
        values = () if self.track is None else self.track.values
        if self.embeds is not None:
            return PlacedTrack((), LINEAR, values)
        planned = PromptTrack.one_prompt(BlockPrompt.of(self.prompt_of(0)).name).place(None, None)
        return replace(planned, values=values)

    def with_edit(self, block: int, edit: Edit) -> Direction:
        """The direction with a line more, which counts from `block` until the track's next line says otherwise."""
        track = self.as_track().with_edit(
            block, prompt=edit.prompt, strength=edit.strength, attention_bias=edit.attention_bias
        )
        return replace(self, track=track, prompt_of=track.at if track.has_prompts else self.prompt_of)

    def until(self, blocks: int) -> Direction:
        """The direction of a stream that ended after so many blocks, at least 1: its track names no others."""
        track = None if self.track is None else self.track.until(blocks)
        if track is None or track is self.track:
            return self
        return replace(self, track=track, prompt_of=track.at if track.has_prompts else self.prompt_of)

    def describe_values(self, blocks: int, attention_bias: float) -> dict[str, Any]:
        """Each value that the track says, by the blocks that had it, such as {"0-3": 0.6, "4": 0.4}.

        Args:
            blocks: that were made.
            attention_bias: where the track does not say.
        """
        described: dict[str, Any] = {}
        if self.track is not None and self.track.has_strength and self.video is not None:
            described["strength_by_block"] = _by_block([self.strength_of(block) for block in range(blocks)])
        if self.track is not None and self.track.has_bias:
            described["attention_bias_by_block"] = _by_block(
                [self.bias_of(block, attention_bias) for block in range(blocks)]
            )
        return described

    def describe(self) -> dict[str, Any]:
        """What was shown, for text output: under a track, its prompts by blocks."""
        if self.track is not None and self.track.has_prompts:
            return {"prompt": "(from the track)", "track": self.track.describe()}
        return {"prompt": self.prompt_of(0) if self.embeds is None else GIVEN_PROMPT}


def _by_block(values: Sequence[float | None]) -> dict[str, float | None]:
    described: dict[str, float | None] = {}
    start = 0
    for value, alike in groupby(values):
        end = start + len(list(alike)) - 1
        described[str(start) if start == end else f"{start}-{end}"] = value
        start = end + 1
    return described
