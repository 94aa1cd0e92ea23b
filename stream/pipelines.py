"""Pipelines a session can call block by block: the built-in causal Wan and foreign modular repositories."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from diffusers.modular_pipelines import ModularPipeline, PipelineState
from torch import nn

from ..wan.attention import install_causal_attention
from ..wan.causal_transformer import tokens_per_latent_frame
from ..wan.causal_wan_blocks import make_causal_wan_pipeline
from ..wan.components import (
    component_bytes,
    load_text_encoder,
    load_tokenizer,
    load_transformer,
    load_vae,
)
from ..wan.text_step import DEFAULT_TEXT_TOKENS, single_prompt
from ..wan.working_memory import activation_bytes, cross_cache_bytes, decoder_bytes, kv_cache_bytes
from .recipe import Recipe
from .residency import Residency
from .settings import StreamSettings

BLOCK_COMPONENTS = ("transformer", "vae")


class StreamPipeline(Protocol):
    """What a session needs of a pipeline."""

    recipe: Recipe
    pipe: ModularPipeline
    device: torch.device

    def start(self, settings: StreamSettings) -> dict[str, Any]:
        """State entries the pipeline expects before block 0."""

    def make_generator(self, seed: int) -> torch.Generator:
        """The stream's noise generator."""

    def encode_prompt(self, state: PipelineState, prompt: str) -> None:
        """Encode ahead of the call, if the pipeline lets a text encoder leave before the rest comes."""

    def bring_components(self, settings: StreamSettings) -> None:
        """Put on the device what a block needs, with room for what it allocates."""

    def is_resident(self) -> bool:
        """Whether what a block needs is on the device."""

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
        self.pipe = make_causal_wan_pipeline()
        self.pipe.update_components(tokenizer=load_tokenizer(components))
        self._sources = {"transformer": model, "vae": components, "text_encoder": components}
        self._dtypes = {"transformer": dtype, "vae": vae_dtype, "text_encoder": dtype}
        self._loaders: dict[str, Callable[[], nn.Module]] = {
            "transformer": self._load_transformer,
            "vae": lambda: load_vae(components, device=device, dtype=vae_dtype),
            "text_encoder": lambda: load_text_encoder(components, device=device, dtype=dtype),
        }

    def start(self, settings: StreamSettings) -> dict[str, Any]:
        """Nothing: the blocks make their own caches at block 0."""
        return {}

    def make_generator(self, seed: int) -> torch.Generator:
        """A CPU generator, so that a seed gives the same noise on every device."""
        return torch.Generator().manual_seed(seed)

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
        self._bring(BLOCK_COMPONENTS, working_bytes=self.working_bytes(settings))

    def is_resident(self) -> bool:
        """Whether transformer and VAE are on the device."""
        return _all_on_device([getattr(self.pipe, name) for name in BLOCK_COMPONENTS], self.device)

    def working_bytes(self, settings: StreamSettings) -> int:
        """Bytes a stream with these settings needs beside the weights; needs the components' configs."""
        config = self.pipe.transformer.config
        scale = self.pipe.vae.config.scale_factor_spatial
        per_frame = tokens_per_latent_frame(self.pipe.transformer, settings.height // scale, settings.width // scale)
        frames = settings.context_frames + settings.frames_per_block
        widest_pass = max(settings.context_frames, settings.frames_per_block) * per_frame
        return (
            kv_cache_bytes(config, frames=frames, tokens_per_frame=per_frame, dtype=self.dtype)
            + cross_cache_bytes(config, text_tokens=DEFAULT_TEXT_TOKENS, dtype=self.dtype)
            + activation_bytes(config, tokens=widest_pass, dtype=self.dtype)
            + decoder_bytes(self.pipe.vae.config, height=settings.height, width=settings.width, dtype=self.vae_dtype)
        )

    def release(self) -> None:
        """Delete every component."""
        self.residency.release()
        for name in ("transformer", "vae", "text_encoder", "tokenizer"):
            setattr(self.pipe, name, None)

    def _load(self, name: str) -> None:
        if getattr(self.pipe, name) is None:
            self.residency.make_room(component_bytes(self._sources[name], name, self._dtypes[name]), self.device)
            self.pipe.update_components(**{name: self._loaders[name]()})

    def _bring(self, names: Sequence[str], working_bytes: int) -> None:
        components = {name: getattr(self.pipe, name) for name in names}
        self.residency.bring(components, self.device, working_bytes)

    def _load_transformer(self) -> nn.Module:
        transformer = load_transformer(self._sources["transformer"], device=self.device, dtype=self.dtype)
        install_causal_attention(transformer, self.recipe.attention_backend)
        return transformer


class ForeignPipeline:
    """A diffusers modular repository with its own blocks, called by Krea Realtime's contract."""

    def __init__(self, recipe: Recipe, pipe: ModularPipeline, device: torch.device, residency: Residency) -> None:
        self.recipe = recipe
        self.pipe = pipe
        self.device = device
        self.residency = residency

    def start(self, settings: StreamSettings) -> dict[str, Any]:
        """`frame_cache_context`, a deque of the length the repository's config names (if it does)."""
        length = self.pipe.config.get("frame_cache_len")
        return {} if length is None else {"frame_cache_context": deque(maxlen=length)}

    def make_generator(self, seed: int) -> torch.Generator:
        """A generator on the pipeline's device, which foreign blocks may require."""
        return torch.Generator(self.device).manual_seed(seed)

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

    def _modules(self) -> dict[str, nn.Module]:
        return {name: component for name, component in self.pipe.components.items() if isinstance(component, nn.Module)}


def _all_on_device(modules: Iterable[nn.Module | None], device: torch.device) -> bool:
    return all(module is not None and next(module.parameters()).device == device for module in modules)
