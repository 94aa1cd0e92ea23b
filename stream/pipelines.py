"""Pipelines a session can call block by block: what it needs of one, and the built-in ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from diffusers.modular_pipelines import PipelineState
from torch import nn

from ..families.model_family import LatentGeometry, ModelFamily
from ..families.stream_preset import StreamPreset
from .built_in_saving import BuiltInSaving
from .carried_state import carried_by_built_in_blocks
from .component_report import report_components
from .component_store import ComponentStore, LoadCallback
from .conditioning import fit_tokens, name_embeds
from .layer_streaming import streamer_of
from .looks import Look, look_away, looking
from .memory_fit import MemoryFit
from .noise_generator import make_noise_generator
from .prompt_encodings import EncodedPrompt
from .recipe import Recipe
from .residency import Residency
from .settings import StreamSettings
from .snapshot_tree import SnapshotKinds
from .state import StreamState
from .streaming_plans import StreamingPlans


class BuiltInPipeline:
    """The pack's own blocks for a family of models; each component is read from disk when first needed.

    Args:
        recipe: of the pipeline.
        family: of the model.
        store: of its components.
        load_tokenizer: reads that of its text encoder; called when a prompt is to be encoded.
        device: where it computes.
        residency: decides what is on the device.
    """

    def __init__(
        self,
        recipe: Recipe,
        *,
        family: ModelFamily,
        store: ComponentStore,
        load_tokenizer: Callable[[], Any],
        device: torch.device,
        residency: Residency,
    ) -> None:
        self.recipe = recipe
        self.family = family
        self.device = device
        self.residency = residency
        self.memory_facts = family.memory_facts
        self.on_look: Look = look_away
        self.pipe = family.make_pipeline()
        self._store = store
        self._plans = StreamingPlans(store)
        self.saving = BuiltInSaving(family, store, self._plans, residency)
        self._load_tokenizer = load_tokenizer
        self.fit = MemoryFit(
            recipe,
            family=family,
            store=store,
            plans=self._plans,
            saving=self.saving,
            residency=residency,
            device=device,
        )

    @property
    def on_load(self) -> LoadCallback:
        """Called after each tensor is loaded."""
        return self._store.on_load

    @on_load.setter
    def on_load(self, callback: LoadCallback) -> None:
        self._store.on_load = callback

    @property
    def geometry(self) -> LatentGeometry:
        """The family's."""
        return self.family.geometry

    def own_preset(self) -> StreamPreset:
        """See `ModelFamily.choose_preset`."""
        return self.family.choose_preset(self._store.components["transformer"])

    def check_settings(self, settings: StreamSettings) -> None:
        """Sizes must be multiples of the family's step, and a prompt needs a text encoder with a tokenizer."""
        self.family.geometry.check_size(settings.width, settings.height)
        if settings.embeds_given:
            return
        if "text_encoder" not in self._store.components:
            raise ValueError(
                f"the pipeline of {self.recipe.model} has no text encoder: choose one under 'text_encoder' in the "
                "loader, or connect a conditioning to the sampler."
            )
        self._bring_tokenizer()

    def start(self, settings: StreamSettings) -> dict[str, Any]:
        """Return nothing: the blocks allocate their caches at block 0."""
        return {}

    def start_from_embeds(self, embeds: torch.Tensor) -> dict[str, Any]:
        """See `StreamPipeline`; padded with zeros to as many tokens as the family's prompts have, or cut."""
        tokens, width = self.family.text_shape(self._store.components["transformer"])
        if embeds.shape[-1] != width:
            raise ValueError(
                f"conditioning is {embeds.shape[-1]} wide and the model takes {width}: encode the text with the text "
                "encoder that belongs to the model."
            )
        fitted = fit_tokens(embeds, tokens)
        return {
            "prompt_embeds": fitted.to(self.device),
            "encoded_prompt": name_embeds(fitted),
            "prompt_tokens_cut": max(0, embeds.shape[1] - tokens),
        }

    def start_from_pictures(self, pictures: torch.Tensor, settings: StreamSettings) -> dict[str, Any]:
        """See `ModelFamily.start_from_pictures`."""
        inputs = settings.pipeline_inputs() | {"video_given": settings.video_given}
        return self.family.start_from_pictures(self.pipe, pictures, inputs)

    def context_pictures(self, settings: StreamSettings) -> int:
        """As many as the context decodes to, if a video starts with it."""
        return self.family.geometry.pixel_frames(settings.context_frames, from_the_start=True)

    def input_pictures(self, settings: StreamSettings, *, from_the_start: bool) -> int:
        """As many as the block decodes to."""
        return self.family.geometry.pixel_frames(settings.frames_per_block, from_the_start=from_the_start)

    def make_generator(self, seed: int) -> torch.Generator:
        """A CPU generator, so that a seed gives the same noise on every device."""
        return make_noise_generator(seed)

    def check_fit(self, settings: StreamSettings) -> StreamSettings:
        """See `MemoryFit.plan`."""
        return self.fit.plan(settings)

    def what_would_fit(self, settings: StreamSettings) -> str:
        """See `MemoryFit.what_would_fit`."""
        return self.fit.what_would_fit(settings)

    def encode_prompt(self, state: PipelineState, prompt: str) -> None:
        """Run the text step alone when the prompt changed, so that a large text encoder can be offloaded first."""
        if state.get("encoded_prompt") == prompt:
            return
        self._bring_text_encoder()
        self._run_text_step(state, prompt)

    def encode_prompts(self, texts: Sequence[str]) -> Mapping[str, EncodedPrompt]:
        """Run the text step once for each text, with the text encoder brought once."""
        self._bring_text_encoder()
        encoded = {}
        for text in texts:
            state = StreamState()
            self._run_text_step(state, text)
            encoded[text] = EncodedPrompt.read(state)
        return encoded

    def bring_components(self, settings: StreamSettings) -> None:
        """Move transformer, VAE and decoder to the device, with room for the stream's caches and activations."""
        for name in self._store.of_blocks():
            self._load(name)
        working_bytes = self.saving.working_bytes(self.fit.estimate(self.recipe.quantization, settings))
        self._store.bring(self._store.of_blocks(), working_bytes)
        self.saving.repeat_calls(self.pipe)

    def is_resident(self) -> bool:
        """Whether transformer, VAE and decoder are on the device."""
        return self._store.are_resident(self._store.of_blocks())

    def held_masks(self) -> Mapping[str, object]:
        """The masks of the transformer, once it is loaded."""
        return self.family.held_masks(self.pipe.transformer)

    def explain_not_finite(self) -> str | None:
        """A weight that is not finite, as the file has it."""
        return self._store.explain_bad_weight()

    def carried_state(self, state: Mapping[str, Any], settings: StreamSettings) -> dict[str, Any]:
        """See `carried_by_built_in_blocks`."""
        return carried_by_built_in_blocks(state, settings)

    def decoder_reach(self) -> int | None:
        """The family's."""
        return self.family.decoder_reach(self.pipe)

    def decode_again(self, latents: torch.Tensor, settings: StreamSettings) -> dict[str, Any]:
        """See `ModelFamily.decode_again`."""
        return self.family.decode_again(self.pipe, latents, settings.pipeline_inputs())

    def snapshot_kinds(self) -> SnapshotKinds:
        """The family's."""
        return self.family.snapshot_kinds()

    def describe(self) -> dict[str, Any]:
        """Plan of each quantized component and its speed here, what each LoRA changed, and which GPU kernels run."""
        components = self._store.components
        report, notices = report_components(components, self.device)
        notices |= {*self._plans.describe(), self.saving.decoding, *self.family.notices(components["transformer"])}
        return report | {
            "family": self.family.name,
            "streaming": self._plans.streaming(),
            "cuda_graphs": self.saving.graphs.off or "on",
            "kernels": self.family.report_kernels(self.pipe, components, self.device),
            "notices": sorted(notices - {""}),
        }

    def change_loras(self, recipe: Recipe) -> None:
        """Become the pipeline of `recipe`, which differs in its LoRAs only: the transformer is read anew when needed.

        Raises CheckpointError for a LoRA that does not fit; the pipeline is what it was then.
        """
        transformer = self.family.with_loras(self._store.components["transformer"], recipe.loras)
        self.saving.drop_graphs()
        self.pipe.transformer = None
        self._store.exchange(transformer)
        self.fit.change_recipe(recipe)
        self.recipe = recipe

    def transformer_bytes(self) -> int:
        """Bytes that the transformer's weights take once it is loaded, from headers only; 0 when it is loaded."""
        return 0 if self.pipe.transformer is not None else self._store.components["transformer"].bytes

    def fit_transformer(self, budget: int) -> bool:
        """Stream as many of the transformer's layers as the budget, in bytes, needs; whether it fits then."""
        return self._plans.fit_transformer(budget)

    def transformer(self) -> nn.Module:
        """The transformer, read from disk if it is not loaded; streamed layers can be read, and not called."""
        module = self._load("transformer")
        streamer = streamer_of(module)
        if streamer is not None:
            streamer.close()
        return module

    def release(self) -> None:
        """Delete every component."""
        self.saving.drop_graphs()
        self._store.release()
        for name in (*self._store.components, "tokenizer"):
            setattr(self.pipe, name, None)

    def _bring_tokenizer(self) -> None:
        if self.pipe.tokenizer is None:
            self.pipe.update_components(tokenizer=self._load_tokenizer())

    def _bring_text_encoder(self) -> None:
        self._bring_tokenizer()
        self._load("text_encoder")
        self._store.bring(["text_encoder"], working_bytes=0)

    def _run_text_step(self, state: PipelineState, prompt: str) -> None:
        step = self.pipe.blocks.sub_blocks["text_encoder"]
        state.set("prompt", prompt)
        with torch.no_grad(), looking(self.on_look, [self.pipe.text_encoder], self.device):
            step(self.pipe, state)

    def _load(self, name: str) -> nn.Module:
        module = self._store.load(name)
        if getattr(self.pipe, name) is not module:
            self.pipe.update_components(**{name: module})
        return module
