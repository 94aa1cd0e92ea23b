"""A pipeline of random weights that people steer: `run_stream` runs it, and its prompts differ."""

from __future__ import annotations

import zlib
from typing import Any

import streamblocks_path  # noqa: F401
from diffusers.modular_pipelines import PipelineState
from full_size_models import ModelSize, ReplaceLinear
from random_pipeline import PipelineOptions, RandomPipeline

from streamblocks.families.model_family import LatentGeometry
from streamblocks.stream.component_store import ignore_load
from streamblocks.stream.memory_saving import OthersOnly
from streamblocks.stream.residency import PlainResidency
from streamblocks.stream.settings import StreamSettings
from streamblocks.wan.family import CAUSAL_WAN_21


class _OwnBlocks(OthersOnly):
    """The blocks are the pack's own, so one can be made again from the state before it."""

    can_make_again = True


class LiveRandomPipeline(RandomPipeline):
    """As `RandomPipeline`, with embeddings for each prompt, by the text encoder where there is one."""

    def __init__(self, size: ModelSize, options: PipelineOptions, replace_linear: ReplaceLinear | None = None) -> None:
        super().__init__(size, options, replace_linear)
        self.on_load = ignore_load

    @property
    def geometry(self) -> LatentGeometry:
        """The family's."""
        return CAUSAL_WAN_21.geometry

    @property
    def saving(self) -> OthersOnly:
        """Nothing but that a block can be made again."""
        return _OwnBlocks(PlainResidency(), self.device)

    def encode_prompt(self, state: PipelineState, prompt: str) -> None:
        """Put embeddings of random words, chosen by the prompt, into the state."""
        if state.get("encoded_prompt") != prompt:
            state.set("prompt_embeds", self.embed_prompt(zlib.crc32(prompt.encode())))
            state.set("encoded_prompt", prompt)

    def check_fit(self, settings: StreamSettings) -> StreamSettings:
        """Everything is on the device already."""
        return settings

    def describe(self) -> dict[str, Any]:
        """Nothing to tell."""
        return {}
