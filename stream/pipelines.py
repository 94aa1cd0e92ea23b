"""Pipelines a session can call block by block: the built-in causal Wan and foreign modular repositories."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import torch
from diffusers.modular_pipelines import ModularPipeline, PipelineState
from torch import nn

from ..memory.cleanup import CleanupPolicy
from ..ops.fp8_linear import fp8_notice
from ..ops.quantization import summarise_plan
from ..wan.checkpoints.components import (
    component_bytes,
    load_text_encoder,
    load_tokenizer,
    load_transformer,
    load_vae,
    plan_for,
)
from ..wan.steps.causal_wan_blocks import make_causal_wan_pipeline
from ..wan.steps.text_step import single_prompt
from ..wan.transformer.attention import install_causal_attention
from ..wan.transformer.compiled_blocks import compile_transformer_blocks
from ..wan.vae.gpu_layout import speed_up_vae
from .estimate import MemoryEstimate, check_it_fits, estimate_memory, smaller_choices
from .recipe import COMPILE_NOTHING, Recipe
from .residency import Residency
from .settings import StreamSettings

logger = logging.getLogger(__name__)

BLOCK_COMPONENTS = ("transformer", "vae")

# Component, bytes in place so far, bytes in all.
LoadCallback = Callable[[str, int, int], None]


def ignore_load(component: str, done: int, total: int) -> None:
    """Nobody watches the loading."""


class StreamPipeline(Protocol):
    """What a session needs of a pipeline."""

    recipe: Recipe
    pipe: ModularPipeline
    device: torch.device
    on_load: LoadCallback

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

    def describe(self) -> dict[str, Any]:
        """What the user should know of how the pipeline was made, as JSON values."""

    def release(self) -> None:
        """Let go of all weights."""


class BuiltInPipeline:
    """The causal Wan pipeline; each component is read from disk, onto the device, when first needed."""

    def __init__(
        self,
        recipe: Recipe,
        *,
        model: Path,
        components: Path,
        device: torch.device,
        dtype: torch.dtype,
        vae_dtype: torch.dtype,
        residency: Residency,
    ) -> None:
        self.recipe = recipe
        self.device = device
        self.dtype = dtype
        self.vae_dtype = vae_dtype
        self.residency = residency
        self.on_load: LoadCallback = ignore_load
        self.pipe = make_causal_wan_pipeline()
        self.pipe.update_components(tokenizer=load_tokenizer(components))
        self._estimates: dict[tuple[Recipe, StreamSettings], MemoryEstimate] = {}
        self._sources = {"transformer": model, "vae": components, "text_encoder": components}
        self._dtypes = {"transformer": dtype, "vae": vae_dtype, "text_encoder": dtype}

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
        others = (
            (text, self._estimate(recipe, changed)) for text, recipe, changed in smaller_choices(self.recipe, settings)
        )
        check_it_fits(self._estimate(self.recipe, settings), available, settings, others)

    def encode_prompt(self, state: PipelineState, prompt: str) -> None:
        """Run the text step alone when the prompt changed, so that 11 GB of text encoder can leave first."""
        if state.get("encoded_prompt") == single_prompt(prompt):
            return
        self._load("text_encoder")
        self._bring(["text_encoder"], working_bytes=0)
        step = self.pipe.blocks.sub_blocks["text_encoder"]
        state.set("prompt", prompt)
        with torch.no_grad():
            step(self.pipe, state)

    def bring_components(self, settings: StreamSettings) -> None:
        """Transformer and VAE, with room for the stream's caches and activations."""
        for name in BLOCK_COMPONENTS:
            self._load(name)
        self._bring(BLOCK_COMPONENTS, working_bytes=self._estimate(self.recipe, settings).streaming)

    def is_resident(self) -> bool:
        """Whether transformer and VAE are on the device."""
        return _all_on_device([getattr(self.pipe, name) for name in BLOCK_COMPONENTS], self.device)

    def describe(self) -> dict[str, Any]:
        """Plan of each quantized component, and whether this device gains speed from it."""
        plans = [
            plan_for(self._sources[name], name, self._dtypes[name], self.recipe.quantization)
            for name in ("transformer", "text_encoder")
        ]
        plans = [plan for plan in plans if plan.spec is not None and plan.quantized_names]
        notices = {fp8_notice(self.device) for plan in plans if plan.spec and plan.spec.format == "fp8"}
        return {"quantization": [summarise_plan(plan) for plan in plans], "notices": sorted(notices - {""})}

    def transformer_bytes(self) -> int:
        """Bytes that the transformer's weights take once it is loaded, from headers only; 0 when it is loaded."""
        if self.pipe.transformer is not None:
            return 0
        source, dtype = self._sources["transformer"], self._dtypes["transformer"]
        return component_bytes(source, "transformer", dtype, self.recipe.quantization)

    def transformer(self) -> nn.Module:
        """The transformer, read from disk if it is not there."""
        self._load("transformer")
        return self.pipe.transformer

    def release(self) -> None:
        """Delete every component."""
        self.residency.release()
        for name in ("transformer", "vae", "text_encoder", "tokenizer"):
            setattr(self.pipe, name, None)

    def _load(self, name: str) -> None:
        if getattr(self.pipe, name) is None:
            weight_bytes = component_bytes(self._sources[name], name, self._dtypes[name], self.recipe.quantization)
            self.residency.make_room(weight_bytes, self.device)
            self.pipe.update_components(**{name: self._read(name, weight_bytes)})
            # Known to the residency at once: weights nobody knows of could never be asked to leave.
            self._bring([name], working_bytes=0)

    def _estimate(self, recipe: Recipe, settings: StreamSettings) -> MemoryEstimate:
        # What changes no size must not cost another rehearsal: a new seed comes with nearly every run.
        settings = replace(
            settings,
            seed=0,
            blocks=1,
            steps=min(settings.steps, 2),
            cleanup=CleanupPolicy.NEVER,
            reset_compile=False,
        )
        key = (recipe, settings)
        if key not in self._estimates:
            self._estimates[key] = estimate_memory(
                recipe,
                settings,
                model=self._sources["transformer"],
                components=self._sources["vae"],
                device=self.device,
                dtype=self.dtype,
                vae_dtype=self.vae_dtype,
            )
        return self._estimates[key]

    def _bring(self, names: Sequence[str], working_bytes: int) -> None:
        components = {name: getattr(self.pipe, name) for name in names}
        self.residency.bring(components, self.device, working_bytes)

    def _read(self, name: str, weight_bytes: int) -> nn.Module:
        plan = plan_for(self._sources[name], name, self._dtypes[name], self.recipe.quantization)
        if plan.spec is not None:
            logger.info("%s", plan.summary())
        placed = 0

        def on_tensor(_: str, tensor_bytes: int) -> None:
            nonlocal placed
            placed += tensor_bytes
            self.on_load(name, placed, weight_bytes)

        source, dtype, quantization = self._sources[name], self._dtypes[name], self.recipe.quantization
        if name == "vae":
            vae = load_vae(source, device=self.device, dtype=dtype, on_tensor=on_tensor)
            speed_up_vae(vae)
            return vae
        if name == "text_encoder":
            return load_text_encoder(
                source, device=self.device, dtype=dtype, quantization=quantization, on_tensor=on_tensor
            )
        transformer = load_transformer(
            source, device=self.device, dtype=dtype, quantization=quantization, on_tensor=on_tensor
        )
        install_causal_attention(transformer, self.recipe.attention_backend)
        if self.recipe.compile != COMPILE_NOTHING:
            compile_transformer_blocks(transformer)
        return transformer


class ForeignPipeline:
    """A diffusers modular repository with its own blocks, called by Krea Realtime's contract."""

    def __init__(self, recipe: Recipe, pipe: ModularPipeline, device: torch.device, residency: Residency) -> None:
        self.recipe = recipe
        self.pipe = pipe
        self.device = device
        self.residency = residency
        self.on_load: LoadCallback = ignore_load

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
        return _all_on_device(self._modules().values(), self.device)

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


def _all_on_device(modules: Iterable[nn.Module | None], device: torch.device) -> bool:
    return all(module is not None and all(p.device == device for p in module.parameters()) for module in modules)
