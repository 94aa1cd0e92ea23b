"""Pipelines a session can call block by block: what it needs of one, and the built-in ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from diffusers.modular_pipelines import PipelineState
from torch import nn

from ..families.kv_policies import KV_AUTO, KV_FP8, KV_PLAIN
from ..families.model_family import AttentionChoice, ModelFamily
from ..families.stream_preset import StreamPreset
from ..memory.cleanup import CleanupPolicy
from ..ops.fp8_linear import fp8_notice
from ..ops.quantization import QuantizationSpec, summarise_plan
from .component_store import ComponentStore, LoadCallback
from .conditioning import GIVEN_PROMPT, fit_tokens
from .estimate import MemoryEstimate, check_it_fits, estimate_memory, requantized, smaller_choices
from .layer_plan import LayerPlan, check_host_memory, more_streamed, plan_layers
from .layer_streaming import streamer_of
from .recipe import COMPILE_NOTHING, Recipe
from .residency import Residency
from .settings import StreamSettings

BLOCK_COMPONENTS = ("transformer", "vae")
# Of the layers, how many can be streamed without the bus setting the pace. Measured with the 14B on an H100: 10 of 40
# cost 2 % at 832x480, while keys in 8 bits and the fused pass cost 6 %.
HIDDEN_SHARE = 0.25


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
        self.pipe = family.make_pipeline()
        self._store = store
        self._plans: dict[str, LayerPlan] = {}
        self._load_tokenizer = load_tokenizer
        self._estimates: dict[tuple[QuantizationSpec | None, StreamSettings], MemoryEstimate] = {}

    @property
    def on_load(self) -> LoadCallback:
        """Called after each tensor is loaded."""
        return self._store.on_load

    @on_load.setter
    def on_load(self, callback: LoadCallback) -> None:
        self._store.on_load = callback

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
        return {
            "prompt_embeds": fit_tokens(embeds, tokens).to(self.device),
            "encoded_prompt": GIVEN_PROMPT,
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
        return torch.Generator().manual_seed(seed)

    def check_fit(self, settings: StreamSettings) -> StreamSettings:
        """Estimate the stream's memory from headers and shapes, and plan which layers stay on the device.

        Where so many layers would be streamed that the bus sets the pace, keys in 8 bits leave room for more of them,
        and a context that takes the first step along needs one pass less over those that are streamed.
        """
        available = self._available_bytes(settings)
        spec = self.recipe.quantization
        packs = settings.kv_format == KV_AUTO
        settings = replace(settings, kv_format=KV_PLAIN) if packs else settings
        if available is None:
            return settings
        if not self._mostly_resident(self._estimate(spec, settings), available):
            settings = replace(settings, kv_format=KV_FP8) if packs else settings
            fused = replace(settings, fuse_context=True)
            # The fused pass has the activations of both.
            settings = fused if self._estimate(spec, fused).least <= available else settings
        choices = smaller_choices(
            spec,
            settings,
            can_quantize=not self._store.components["transformer"].is_stored_quantized,
            size_step=self.family.geometry.size_step,
        )
        others = ((text, self._estimate(other, changed)) for text, other, changed in choices)
        estimate = self._estimate(spec, settings)
        check_it_fits(estimate, available, settings, others)
        self._store.budget = available - estimate.overhead if settings.memory_gb else None
        self._plan_layers(estimate, available, with_text_encoder=not settings.embeds_given)
        return settings

    def _mostly_resident(self, estimate: MemoryEstimate, available: int) -> bool:
        """Whether so few of the transformer's layers are streamed that their copies are sure to hide."""
        component = self._store.components["transformer"]
        budget = estimate.left_for("transformer", available)
        plan = plan_layers("transformer", component.bytes, component.layer_bytes, budget)
        return plan is not None and len(plan.streamed) <= HIDDEN_SHARE * plan.layers

    def _available_bytes(self, settings: StreamSettings) -> int | None:
        free = self.residency.available_bytes(self.device)
        if not settings.memory_gb:
            return free
        if free is None or not self.residency.streams_layers(self.device):
            raise ValueError(
                f"memory_gb is {settings.memory_gb:g} and the device is {self.device}, whose memory is not managed: "
                "leave it at 0."
            )
        return min(free, int(settings.memory_gb * 1e9))

    def _plan_layers(self, estimate: MemoryEstimate, available: int, *, with_text_encoder: bool) -> None:
        self._plans.clear()
        for name in ("transformer", "text_encoder") if with_text_encoder else ("transformer",):
            component = self._store.components[name]
            plan = plan_layers(name, component.bytes, component.layer_bytes, estimate.left_for(name, available))
            # `check_it_fits` has seen that there is one.
            assert plan is not None
            self._plans[name] = plan
        check_host_memory(self._plans.values(), self._store.host_bytes)
        for name, plan in self._plans.items():
            self._store.stream_layers(name, plan.streamed)

    def encode_prompt(self, state: PipelineState, prompt: str) -> None:
        """Run the text step alone when the prompt changed, so that a large text encoder can be offloaded first."""
        if state.get("encoded_prompt") == prompt:
            return
        self._bring_tokenizer()
        self._load("text_encoder")
        self._store.bring(["text_encoder"], working_bytes=0)
        step = self.pipe.blocks.sub_blocks["text_encoder"]
        state.set("prompt", prompt)
        with torch.no_grad():
            step(self.pipe, state)

    def stream_more_layers(self) -> bool:
        """A tenth of the transformer's layers more."""
        component = self._store.components["transformer"]
        plan = more_streamed(self._plans.get("transformer"), component.bytes, component.layer_bytes)
        if plan is None:
            return False
        self._plans["transformer"] = plan
        self._store.stream_layers("transformer", plan.streamed)
        return True

    def bring_components(self, settings: StreamSettings) -> None:
        """Move transformer and VAE to the device, with room for the stream's caches and activations."""
        for name in BLOCK_COMPONENTS:
            self._load(name)
        self._store.bring(BLOCK_COMPONENTS, self._estimate(self.recipe.quantization, settings).streaming)

    def is_resident(self) -> bool:
        """Whether transformer and VAE are on the device."""
        return self._store.are_resident(BLOCK_COMPONENTS)

    def held_masks(self) -> Mapping[str, object]:
        """The masks of the transformer, once it is loaded."""
        return self.family.held_masks(self.pipe.transformer)

    def explain_not_finite(self) -> str | None:
        """A weight that is not finite, as the file has it."""
        return self._store.explain_bad_weight()

    def describe(self) -> dict[str, Any]:
        """Plan of each quantized component and its speed here, what each LoRA changed, and which GPU kernels run."""
        plans = [component.plan for component in self._store.components.values()]
        plans = [plan for plan in plans if plan.spec is not None and plan.quantized_names]
        # What runs once a prompt costs no time that a user would notice.
        in_blocks = [plan for plan in plans if plan.component in BLOCK_COMPONENTS]
        notices = {fp8_notice(self.device) for plan in in_blocks if plan.spec and plan.spec.format == "fp8"}
        loras = [match for component in self._store.components.values() for match in component.weights.loras]
        notices |= {match.notice for match in loras}
        notices |= {plan.describe() for plan in self._plans.values()}
        notices |= set(self.family.notices(self._store.components["transformer"]))
        return {
            "family": self.family.name,
            "loras": [match.describe() for match in loras],
            "quantization": [summarise_plan(plan) for plan in plans],
            "streaming": self._store.streaming(),
            "kernels": self.family.report_kernels(self.pipe, self._store.components, self.device),
            "notices": sorted(notices - {""}),
        }

    def change_loras(self, recipe: Recipe) -> None:
        """Become the pipeline of `recipe`, which differs in its LoRAs only: the transformer is read anew when needed.

        Raises CheckpointError for a LoRA that does not fit; the pipeline is what it was then.
        """
        transformer = self.family.with_loras(self._store.components["transformer"], recipe.loras)
        self.pipe.transformer = None
        self._store.exchange(transformer)
        self._estimates.clear()
        self.recipe = recipe

    def transformer_bytes(self) -> int:
        """Bytes that the transformer's weights take once it is loaded, from headers only; 0 when it is loaded."""
        return 0 if self.pipe.transformer is not None else self._store.components["transformer"].bytes

    def fit_transformer(self, budget: int) -> bool:
        """Stream as many of the transformer's layers as the budget, in bytes, needs; whether it fits then."""
        component = self._store.components["transformer"]
        plan = plan_layers("transformer", component.bytes, component.layer_bytes, budget)
        if plan is not None:
            self._plans["transformer"] = plan
            self._store.stream_layers("transformer", plan.streamed)
        return plan is not None

    def transformer(self) -> nn.Module:
        """The transformer, read from disk if it is not loaded; streamed layers' weights lie in RAM, to be read."""
        module = self._load("transformer")
        streamer = streamer_of(module)
        if streamer is not None:
            streamer.close()
        return module

    def release(self) -> None:
        """Delete every component."""
        self._store.release()
        for name in (*self._store.components, "tokenizer"):
            setattr(self.pipe, name, None)

    def _bring_tokenizer(self) -> None:
        if self.pipe.tokenizer is None:
            self.pipe.update_components(tokenizer=self._load_tokenizer())

    def _load(self, name: str) -> nn.Module:
        module = self._store.load(name)
        if getattr(self.pipe, name) is not module:
            self.pipe.update_components(**{name: module})
        return module

    def _estimate(self, spec: QuantizationSpec | None, settings: StreamSettings) -> MemoryEstimate:
        # Settings that change no size share a cached rehearsal: nearly every run has a new seed.
        settings = replace(
            settings,
            seed=0,
            blocks=1,
            steps=min(settings.steps, 2),
            timesteps=None,
            first_block_timesteps=None,
            cleanup=CleanupPolicy.NEVER,
            reset_compile=False,
            memory_gb=0.0,
            start_given=False,
        )
        key = (spec, settings)
        if key not in self._estimates:
            components = self._store.components
            if spec != self.recipe.quantization:
                components = requantized(components, spec)
            estimate = estimate_memory(self.family, components, settings, attention_choice(self.recipe), self.device)
            if not self.residency.streams_layers(self.device):
                estimate = estimate.without_streaming()
            self._estimates[key] = estimate
        return self._estimates[key]


def attention_choice(recipe: Recipe) -> AttentionChoice:
    """How attention is computed under a recipe."""
    return AttentionChoice(recipe.attention_backend, compiled=recipe.compile != COMPILE_NOTHING)
