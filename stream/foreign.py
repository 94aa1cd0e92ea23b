"""A diffusers modular repository that brings its own blocks."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers.modular_pipelines import ModularPipeline, PipelineState
from torch import nn

from ..families.model_family import LatentGeometry
from ..families.stream_preset import StreamPreset
from ..memory.cleanup import handling_table
from ..memory.pipeline_facts import UNKNOWN_PIPELINE
from .carried_state import carried_by_unknown_blocks
from .code_import import ImportedCode
from .component_store import LoadCallback, all_on_device, ignore_load
from .estimate import SMALLER
from .foreign_limits import refuse_what_blocks_do_not_take
from .known_families import FAMILIES
from .looks import Look, look_away
from .memory_saving import OthersOnly
from .noise_generator import make_noise_generator
from .prompt_encodings import EncodedPrompt
from .recipe import Recipe
from .residency import Residency
from .settings import StreamSettings
from .snapshot_tree import SnapshotKinds


class ForeignPipeline:
    """A diffusers modular repository with its own blocks, called by the contract in docs/architecture.md.

    Args:
        recipe: of the repository.
        pipe: with all components.
        device: that it runs on.
        residency: decides what is on the device.
        imported: the repository's code; None if it has none.
    """

    def __init__(
        self,
        recipe: Recipe,
        pipe: ModularPipeline,
        device: torch.device,
        residency: Residency,
        imported: ImportedCode | None = None,
    ) -> None:
        self.recipe = recipe
        self._imported = imported
        self.pipe = pipe
        self.device = device
        self.residency = residency
        self.memory_facts = UNKNOWN_PIPELINE
        self.saving = OthersOnly(residency, device)
        self.on_load: LoadCallback = ignore_load
        self.on_look: Look = look_away

    @property
    def geometry(self) -> LatentGeometry:
        """What foreign blocks decode to is not known; the first family's."""
        return FAMILIES[0].geometry

    def own_preset(self) -> StreamPreset:
        """What foreign blocks need is not known; their inputs have the names and values of the first family's."""
        return FAMILIES[0].presets[0]

    def check_settings(self, settings: StreamSettings) -> None:
        """Which sizes foreign blocks take is not known; their own text encoder step takes a prompt."""
        refuse_what_blocks_do_not_take(
            self.recipe,
            embeds_given=settings.embeds_given,
            start_given=settings.start_given,
            video_given=settings.video_given,
        )

    def start(self, settings: StreamSettings) -> dict[str, Any]:
        """`frame_cache_context`, a deque of the length in the repository's config; empty if the config has none."""
        length = self.pipe.config.get("frame_cache_len")
        return {} if length is None else {"frame_cache_context": deque(maxlen=length)}

    def start_from_embeds(self, embeds: torch.Tensor) -> dict[str, Any]:
        """Nothing: `check_settings` refuses them."""
        return {}

    def start_from_pictures(self, pictures: torch.Tensor, settings: StreamSettings) -> dict[str, Any]:
        """Nothing: `check_settings` refuses them."""
        return {}

    def context_pictures(self, settings: StreamSettings) -> int:
        """None: `check_settings` refuses a start."""
        return 0

    def input_pictures(self, settings: StreamSettings, *, from_the_start: bool) -> int:
        """None: `check_settings` refuses an input video."""
        return 0

    def make_generator(self, seed: int) -> torch.Generator:
        """A generator on the pipeline's device, which foreign blocks may require."""
        return make_noise_generator(seed, self.device)

    def check_fit(self, settings: StreamSettings) -> StreamSettings:
        """Return the settings: what foreign blocks allocate is unknown."""
        return settings

    def encode_prompt(self, state: PipelineState, prompt: str) -> None:
        """Do nothing: the repository's own text encoder step runs inside the call."""

    def encode_prompts(self, texts: Sequence[str]) -> Mapping[str, EncodedPrompt]:
        """Return nothing: see `encode_prompt`."""
        return {}

    def what_would_fit(self, settings: StreamSettings) -> str:
        """What takes less with any blocks."""
        return SMALLER

    def bring_components(self, settings: StreamSettings) -> None:
        """Move all components that are modules to the device; what the blocks allocate is unknown."""
        self.residency.bring(self._modules(), self.device, working_bytes=0)

    def is_resident(self) -> bool:
        """Whether all components that are modules are on the device."""
        return all_on_device(self._modules().values(), self.device)

    def held_masks(self) -> Mapping[str, object]:
        """Return nothing: the masks of foreign blocks are unknown."""
        return {}

    def release(self) -> None:
        """Delete every component, and take the repository's modules out of `sys.modules`."""
        self.residency.release()
        for name in self.pipe.component_names:
            setattr(self.pipe, name, None)
        if self._imported is not None:
            self._imported.forget()

    def explain_not_finite(self) -> str | None:
        """Nothing: where foreign weights came from is unknown."""
        return None

    def carried_state(self, state: Mapping[str, Any], settings: StreamSettings) -> dict[str, Any]:
        """Everything that stays between blocks: which of it foreign blocks need is unknown."""
        return carried_by_unknown_blocks(state, handling_table(self.recipe.state_rules), self.pipe.blocks.input_names)

    def decoder_reach(self) -> int | None:
        """None: how foreign blocks decode is unknown."""
        return None

    def decode_again(self, latents: torch.Tensor, settings: StreamSettings) -> dict[str, Any]:
        """Nothing: see `decoder_reach`."""
        return {}

    def snapshot_kinds(self) -> SnapshotKinds:
        """Return nothing: a repository's own classes are not put into snapshots."""
        return {}

    def describe(self) -> dict[str, Any]:
        """Return nothing: foreign blocks are not quantized here."""
        return {}

    def _modules(self) -> dict[str, nn.Module]:
        return {name: component for name, component in self.pipe.components.items() if isinstance(component, nn.Module)}
