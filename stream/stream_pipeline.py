"""What a session needs of a pipeline, whether its blocks are built in or a repository's own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from diffusers.modular_pipelines import ModularPipeline, PipelineState

from ..families.model_family import LatentGeometry
from ..families.stream_preset import StreamPreset
from ..memory.pipeline_facts import PipelineFacts
from .component_store import LoadCallback
from .looks import Look
from .memory_saving import MemorySaving
from .prompt_encodings import EncodedPrompt
from .recipe import Recipe
from .settings import StreamSettings
from .snapshot_tree import SnapshotKinds


class StreamPipeline(Protocol):
    """What a session needs of a pipeline."""

    recipe: Recipe
    pipe: ModularPipeline
    device: torch.device
    on_load: LoadCallback
    # Called while its modules compute; see `looking`.
    on_look: Look
    # Names of its stages, and advice on its state, for the memory timeline.
    memory_facts: PipelineFacts

    @property
    def geometry(self) -> LatentGeometry:
        """How latents relate to pictures."""

    def own_preset(self) -> StreamPreset:
        """How the makers of the model stream it, as far as its files say which model it is."""

    def check_settings(self, settings: StreamSettings) -> None:
        """Raise ValueError for what this pipeline cannot do, before anything is loaded."""

    def start(self, settings: StreamSettings) -> dict[str, Any]:
        """State entries the pipeline expects before block 0."""

    def start_from_embeds(self, embeds: torch.Tensor) -> dict[str, Any]:
        """State entries that stand for the prompt `encoded_prompt` among them, from embeddings [1, tokens, width].

        Raises ValueError for embeddings of another width than the model takes.
        """

    def start_from_pictures(self, pictures: torch.Tensor, settings: StreamSettings) -> dict[str, Any]:
        """State entries of a stream that goes on after `pictures`, uint8 [F, height, width, 3], oldest first.

        The components are on the device.
        """

    def context_pictures(self, settings: StreamSettings) -> int:
        """How many pictures of its past a stream can make use of."""

    def input_pictures(self, settings: StreamSettings, *, from_the_start: bool) -> int:
        """How many pictures of an input video a block is made from, the first of the video or another."""

    def make_generator(self, seed: int) -> torch.Generator:
        """The stream's noise generator; seeds that differ give different noise (`make_noise_generator`)."""

    def encode_prompt(self, state: PipelineState, prompt: str) -> None:
        """Encode the prompt before the call, if the text encoder can then be offloaded before the rest is loaded."""

    def encode_prompts(self, texts: Sequence[str]) -> Mapping[str, EncodedPrompt]:
        """Encode several prompts at once, before a stream; empty where only a call of the pipeline can."""

    def check_fit(self, settings: StreamSettings) -> StreamSettings:
        """Raise MemoryError, before anything is loaded, when a stream with `settings` cannot fit the device.

        Returns the settings, with what they leave to the memory decided.
        """

    @property
    def saving(self) -> MemorySaving:
        """What it can do when the device runs out of memory."""

    def what_would_fit(self, settings: StreamSettings) -> str:
        """What to choose instead of `settings`, which ran out of memory; a clause behind "choose"."""

    def bring_components(self, settings: StreamSettings) -> None:
        """Move what a block needs to the device, with room for what it allocates."""

    def is_resident(self) -> bool:
        """Whether what a block needs is on the device."""

    def held_masks(self) -> Mapping[str, object]:
        """Attention masks that the pipeline keeps, for the memory timeline."""

    def explain_not_finite(self) -> str | None:
        """Why a block may have come out NaN or infinite, and what to do; None when it is not known."""

    def carried_state(self, state: Mapping[str, Any], settings: StreamSettings) -> dict[str, Any]:
        """The entries of a stream's state, between two blocks, that its next block needs in another session."""

    def decoder_reach(self) -> int | None:
        """How many latent frames, decoded again, leave the decoder as it is; None where it cannot be made anew so.

        The components are on the device.
        """

    def decode_again(self, latents: torch.Tensor, settings: StreamSettings) -> dict[str, Any]:
        """State entries of a decoder that has decoded `latents`, float32 [1, channels, frames, height, width].

        The components are on the device.
        """

    def snapshot_kinds(self) -> SnapshotKinds:
        """The classes of objects in the state that snapshots hold; see `Snapshottable`."""

    def describe(self) -> dict[str, Any]:
        """What the user should know about how the pipeline was made, as JSON values."""

    def release(self) -> None:
        """Release all weights."""
