"""A diffusers modular repository that brings its own blocks."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers.modular_pipelines import ModularPipeline, PipelineState
from torch import nn

from ..checkpoints.checkpoint_files import CheckpointError
from ..checkpoints.json_text import read_json
from ..families.model_family import LatentGeometry
from ..families.stream_preset import StreamPreset
from ..memory.cleanup import handling_table
from ..memory.pipeline_facts import UNKNOWN_PIPELINE
from .carried_state import carried_by_unknown_blocks
from .component_store import LoadCallback, all_on_device, ignore_load
from .foreign_limits import refuse_what_blocks_do_not_take
from .hub import Check, fetch_file, never_cancelled, refuse_folder_as_hub_id
from .known_families import FAMILIES
from .looks import Look, look_away
from .noise_generator import make_noise_generator
from .prompt_encodings import EncodedPrompt
from .recipe import Recipe, is_hub_id
from .remote_code import check_remote_code_allowed
from .residency import Residency
from .settings import StreamSettings
from .snapshot_tree import SnapshotKinds

_MODULAR_CONFIG = "modular_config.json"
# What diffusers and transformers read by themselves, of a repository and of its components.
_CONFIGS = ("config.json", "*_config.json", "*index.json")
_MODEL_COMPONENTS = ("transformer", "vae", "text_encoder", "text_encoder_2", "image_encoder")


class ForeignPipeline:
    """A diffusers modular repository with its own blocks, called by the contract in docs/architecture.md."""

    def __init__(self, recipe: Recipe, pipe: ModularPipeline, device: torch.device, residency: Residency) -> None:
        self.recipe = recipe
        self.pipe = pipe
        self.device = device
        self.residency = residency
        self.memory_facts = UNKNOWN_PIPELINE
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

    def stream_more_layers(self) -> bool:
        """Return False: in which order foreign blocks call layers is unknown."""
        return False

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
        """Delete every component."""
        self.residency.release()
        for name in self.pipe.component_names:
            setattr(self.pipe, name, None)

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


def load_foreign_pipeline(
    recipe: Recipe, *, dtype: torch.dtype, vae_dtype: torch.dtype, check: Check = never_cancelled
) -> ModularPipeline:
    """Blocks from the repository's code (if the user ticked it), weights from safetensors only.

    Args:
        recipe: of the pipeline.
        dtype: of its components.
        vae_dtype: of its VAE.
        check: called while the hub is asked for the repository; raises to give up.

    Raises:
        CheckpointError: remote code is needed and the user did not allow it, or a component did not load.
        PermissionError: the user allowed remote code, and this server does not.
    """
    if recipe.is_hub_id:
        refuse_folder_as_hub_id(recipe.model)
    if recipe.trust_remote_code:
        check_remote_code_allowed(recipe.model)
    config = _config_of(recipe, check)
    if not recipe.trust_remote_code:
        _refuse_unasked_code(recipe, config)
    if not recipe.is_hub_id:
        _check_configs(Path(recipe.model))
    try:
        pipe = ModularPipeline.from_pretrained(
            recipe.model, trust_remote_code=recipe.trust_remote_code, revision=recipe.revision
        )
    except (OSError, ValueError, ImportError, TypeError, AttributeError, LookupError, AssertionError) as error:
        raise CheckpointError(
            f"model {recipe.model!r} is not a diffusers modular repository that can be used here: {error}"
        ) from error
    _refuse_other_places(recipe, pipe)
    pipe.load_components(
        dtype={"default": dtype, "vae": vae_dtype},
        # Never a pickled file, even if a repository has both.
        use_safetensors=dict.fromkeys(_MODEL_COMPONENTS, True),
        **({"trust_remote_code": True} if recipe.trust_remote_code else {}),
    )
    missing = [name for name in pipe.pretrained_component_names if getattr(pipe, name, None) is None]
    if missing:
        raise CheckpointError(
            f"model {recipe.model!r} did not provide {', '.join(missing)}: its files are incomplete or not "
            "safetensors; the log above says why."
        )
    return pipe


def _check_configs(folder: Path) -> None:
    """Raise CheckpointError for a config that diffusers would wait for, or fail on without its name."""
    for pattern in _CONFIGS:
        for config in sorted((*folder.glob(pattern), *folder.glob(f"*/{pattern}"))):
            read_json(config)


def _refuse_other_places(recipe: Recipe, pipe: ModularPipeline) -> None:
    """Components come from the repository or from the hub; its index could name any path on this machine."""
    for name in pipe.pretrained_component_names:
        place = getattr(pipe.get_component_spec(name), "pretrained_model_name_or_path", None)
        if place is None or str(place) == recipe.model:
            continue
        if not is_hub_id(str(place)):
            raise CheckpointError(
                f"model {recipe.model!r} takes its {name} from {str(place)!r}, which is outside of it: name the "
                "repository itself or a hub id in its modular_model_index.json."
            )
        refuse_folder_as_hub_id(str(place))


def _config_of(recipe: Recipe, check: Check) -> Path | None:
    """The repository's modular config, None where a hub repository has none; asks the hub before diffusers does.

    diffusers' own calls wait minutes for a hub that does not answer, and cannot be cancelled.
    """
    if recipe.is_hub_id:
        return fetch_file(recipe.model, recipe.revision, _MODULAR_CONFIG, check)
    return Path(recipe.model) / _MODULAR_CONFIG


def _refuse_unasked_code(recipe: Recipe, config: Path | None) -> None:
    """Refuse before diffusers does: diffusers may ask on a terminal, which a server does not have."""
    if config is not None and config.is_file() and "auto_map" in read_json(config):
        raise CheckpointError(
            f"model {recipe.model!r} has its own Python code, which runs only if you allow it: read it, then tick "
            "'trust_remote_code', or choose the built-in blocks."
        )
