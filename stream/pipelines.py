"""Pipelines a session can call block by block: built-in ones and foreign modular repositories."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Protocol

import torch
from diffusers.modular_pipelines import ModularPipeline, PipelineState
from torch import nn

from ..families.model_family import AttentionChoice, ModelFamily
from ..memory.cleanup import CleanupPolicy
from ..memory.pipeline_facts import UNKNOWN_PIPELINE, PipelineFacts
from ..ops.fp8_linear import fp8_notice
from ..ops.quantization import QuantizationSpec, summarise_plan
from .component_store import ComponentStore, LoadCallback, all_on_device, ignore_load
from .estimate import MemoryEstimate, check_it_fits, estimate_memory, requantized, smaller_choices
from .recipe import COMPILE_NOTHING, Recipe
from .residency import Residency
from .settings import StreamSettings

BLOCK_COMPONENTS = ("transformer", "vae")


class StreamPipeline(Protocol):
    """What a session needs of a pipeline."""

    recipe: Recipe
    pipe: ModularPipeline
    device: torch.device
    on_load: LoadCallback
    # What the memory timeline calls its stages, and what it advises on its state.
    memory_facts: PipelineFacts

    def check_settings(self, settings: StreamSettings) -> None:
        """Raise ValueError for what this pipeline cannot do, before anything is loaded."""

    def start(self, settings: StreamSettings) -> dict[str, Any]:
        """State entries the pipeline expects before block 0."""

    def make_generator(self, seed: int) -> torch.Generator:
        """The stream's noise generator."""

    def encode_prompt(self, state: PipelineState, prompt: str) -> None:
        """Encode ahead of the call, if the pipeline lets a text encoder leave before the rest comes."""

    def check_fit(self, settings: StreamSettings) -> None:
        """Raise MemoryError, before anything is loaded, when a stream with `settings` cannot fit the device."""

    def bring_components(self, settings: StreamSettings) -> None:
        """Put on the device what a block needs, with room for what it allocates."""

    def is_resident(self) -> bool:
        """Whether what a block needs is on the device."""

    def held_masks(self) -> Mapping[str, object]:
        """Attention masks that it keeps, for the memory timeline."""

    def describe(self) -> dict[str, Any]:
        """What the user should know of how the pipeline was made, as JSON values."""

    def release(self) -> None:
        """Let go of all weights."""


class BuiltInPipeline:
    """The pack's own blocks for a family of models; each component is read from disk when first needed.

    Args:
        recipe: that it is made from.
        family: of the model.
        store: of its components.
        tokenizer: of its text encoder.
        device: where it computes.
        residency: decides what is on the device.
    """

    def __init__(
        self,
        recipe: Recipe,
        *,
        family: ModelFamily,
        store: ComponentStore,
        tokenizer: Any,  # noqa: ANN401
        device: torch.device,
        residency: Residency,
    ) -> None:
        self.recipe = recipe
        self.family = family
        self.device = device
        self.residency = residency
        self.memory_facts = family.memory_facts
        self.pipe = family.make_pipeline()
        self.pipe.update_components(tokenizer=tokenizer)
        self._store = store
        self._estimates: dict[tuple[QuantizationSpec | None, StreamSettings], MemoryEstimate] = {}

    @property
    def on_load(self) -> LoadCallback:
        """Told of each tensor that is in place."""
        return self._store.on_load

    @on_load.setter
    def on_load(self, callback: LoadCallback) -> None:
        self._store.on_load = callback

    def check_settings(self, settings: StreamSettings) -> None:
        """Sizes must be multiples of the family's step."""
        self.family.geometry.check_size(settings.width, settings.height)

    def start(self, settings: StreamSettings) -> dict[str, Any]:
        """Nothing: the blocks make their own caches at block 0."""
        return {}

    def make_generator(self, seed: int) -> torch.Generator:
        """A CPU generator, so that a seed gives the same noise on every device."""
        return torch.Generator().manual_seed(seed)

    def check_fit(self, settings: StreamSettings) -> None:
        """Estimate the stream's memory from headers and shapes, and compare with what the device can give."""
        available = self.residency.available_bytes(self.device)
        if available is None:
            return
        choices = smaller_choices(
            self.recipe.quantization,
            settings,
            can_quantize=not self._store.components["transformer"].is_stored_quantized,
            size_step=self.family.geometry.size_step,
        )
        others = ((text, self._estimate(spec, changed)) for text, spec, changed in choices)
        check_it_fits(self._estimate(self.recipe.quantization, settings), available, settings, others)

    def encode_prompt(self, state: PipelineState, prompt: str) -> None:
        """Run the text step alone when the prompt changed, so that a large text encoder can leave first."""
        if state.get("encoded_prompt") == prompt:
            return
        self._load("text_encoder")
        self._store.bring(["text_encoder"], working_bytes=0)
        step = self.pipe.blocks.sub_blocks["text_encoder"]
        state.set("prompt", prompt)
        with torch.no_grad():
            step(self.pipe, state)

    def bring_components(self, settings: StreamSettings) -> None:
        """Transformer and VAE, with room for the stream's caches and activations."""
        for name in BLOCK_COMPONENTS:
            self._load(name)
        self._store.bring(BLOCK_COMPONENTS, self._estimate(self.recipe.quantization, settings).streaming)

    def is_resident(self) -> bool:
        """Whether transformer and VAE are on the device."""
        return self._store.are_resident(BLOCK_COMPONENTS)

    def held_masks(self) -> Mapping[str, object]:
        """Those of the transformer, once it is loaded."""
        return self.family.held_masks(self.pipe.transformer)

    def describe(self) -> dict[str, Any]:
        """Plan of each quantized component and its speed here, what each LoRA changed, and which GPU kernels run."""
        plans = [component.plan for component in self._store.components.values()]
        plans = [plan for plan in plans if plan.spec is not None and plan.quantized_names]
        notices = {fp8_notice(self.device) for plan in plans if plan.spec and plan.spec.format == "fp8"}
        loras = [match for component in self._store.components.values() for match in component.weights.loras]
        notices |= {match.notice for match in loras}
        return {
            "family": self.family.name,
            "loras": [match.describe() for match in loras],
            "quantization": [summarise_plan(plan) for plan in plans],
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

    def transformer(self) -> nn.Module:
        """The transformer, read from disk if it is not there."""
        return self._load("transformer")

    def release(self) -> None:
        """Delete every component."""
        self._store.release()
        for name in (*self._store.components, "tokenizer"):
            setattr(self.pipe, name, None)

    def _load(self, name: str) -> nn.Module:
        module = self._store.load(name)
        if getattr(self.pipe, name) is not module:
            self.pipe.update_components(**{name: module})
        return module

    def _estimate(self, spec: QuantizationSpec | None, settings: StreamSettings) -> MemoryEstimate:
        # What changes no size must not cost another rehearsal: a new seed comes with nearly every run.
        settings = replace(
            settings,
            seed=0,
            blocks=1,
            steps=min(settings.steps, 2),
            cleanup=CleanupPolicy.NEVER,
            reset_compile=False,
        )
        key = (spec, settings)
        if key not in self._estimates:
            components = self._store.components
            if spec != self.recipe.quantization:
                components = requantized(components, spec)
            self._estimates[key] = estimate_memory(
                self.family, components, settings, attention_choice(self.recipe), self.device
            )
        return self._estimates[key]


def attention_choice(recipe: Recipe) -> AttentionChoice:
    """How a recipe has attention computed."""
    return AttentionChoice(recipe.attention_backend, compiled=recipe.compile != COMPILE_NOTHING)


class ForeignPipeline:
    """A diffusers modular repository with its own blocks, called by the contract in docs/architecture.md."""

    def __init__(self, recipe: Recipe, pipe: ModularPipeline, device: torch.device, residency: Residency) -> None:
        self.recipe = recipe
        self.pipe = pipe
        self.device = device
        self.residency = residency
        self.memory_facts = UNKNOWN_PIPELINE
        self.on_load: LoadCallback = ignore_load

    def check_settings(self, settings: StreamSettings) -> None:
        """Nothing: which sizes foreign blocks take is not known."""

    def start(self, settings: StreamSettings) -> dict[str, Any]:
        """`frame_cache_context`, a deque of the length the repository's config names (if it does)."""
        length = self.pipe.config.get("frame_cache_len")
        return {} if length is None else {"frame_cache_context": deque(maxlen=length)}

    def make_generator(self, seed: int) -> torch.Generator:
        """A generator on the pipeline's device, which foreign blocks may require."""
        return torch.Generator(self.device).manual_seed(seed)

    def check_fit(self, settings: StreamSettings) -> None:
        """Nothing: what foreign blocks allocate is not known."""

    def encode_prompt(self, state: PipelineState, prompt: str) -> None:
        """Nothing: the repository's own text encoder step runs inside the call."""

    def bring_components(self, settings: StreamSettings) -> None:
        """All components that are modules; what the blocks allocate is theirs to know."""
        self.residency.bring(self._modules(), self.device, working_bytes=0)

    def is_resident(self) -> bool:
        """Whether all components that are modules are on the device."""
        return all_on_device(self._modules().values(), self.device)

    def held_masks(self) -> Mapping[str, object]:
        """None that are known."""
        return {}

    def release(self) -> None:
        """Delete every component."""
        self.residency.release()
        for name in self.pipe.component_names:
            setattr(self.pipe, name, None)

    def describe(self) -> dict[str, Any]:
        """Nothing: foreign blocks are not quantized here."""
        return {}

    def _modules(self) -> dict[str, nn.Module]:
        return {name: component for name, component in self.pipe.components.items() if isinstance(component, nn.Module)}
