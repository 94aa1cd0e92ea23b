"""A pipeline of random weights that the real `Session` streams."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import streamblocks_path  # noqa: F401
import torch
from diffusers.modular_pipelines import PipelineState
from full_size_models import ModelSize, ReplaceLinear, build_text_encoder, build_transformer, build_vae

from streamblocks.stream.device_choice import check_attention_backend, choose_vae_dtype
from streamblocks.stream.looks import look_away
from streamblocks.stream.memory_saving import OthersOnly
from streamblocks.stream.recipe import Recipe
from streamblocks.stream.residency import PlainResidency
from streamblocks.stream.settings import StreamSettings
from streamblocks.wan.family import CAUSAL_WAN_21
from streamblocks.wan.steps.causal_wan_blocks import make_causal_wan_pipeline
from streamblocks.wan.steps.text_step import DEFAULT_TEXT_TOKENS
from streamblocks.wan.transformer.installed_attention import (
    block_masks_of,
    causal_attention_of,
    install_causal_attention,
)
from streamblocks.wan.vae.gpu_layout import speed_up_decoder, speed_up_vae
from streamblocks.wan.vae.tiny_decoder import TinyDecoder, TinyDecoderConfig

PROMPT = "random weights"
_PROMPT_TOKENS = 60


@dataclass(frozen=True)
class PipelineOptions:
    """What a pipeline is built with.

    Attributes:
        device: where everything is.
        dtype: the transformer computes in.
        text_encoder: whether the text encoder is on the card too.
        fused_vae: the VAE as the pack runs it; False leaves it as diffusers has it.
        device_noise: noise drawn on the device instead of on the CPU.
        tiny_decoder: one in TAEHV's layout decodes in the VAE's place.
        seed: of the weights.
    """

    device: torch.device
    dtype: torch.dtype
    text_encoder: bool = False
    fused_vae: bool = True
    device_noise: bool = False
    tiny_decoder: bool = False
    seed: int = 0


class RandomPipeline:
    """Follows `StreamPipeline`; every component is on the device from the start and stays.

    There is no tokenizer: the prompt's embeddings are put into the state before the call.
    """

    def __init__(self, size: ModelSize, options: PipelineOptions, replace_linear: ReplaceLinear | None = None) -> None:
        self.recipe = Recipe(model=f"random/{size.name}")
        self.device = options.device
        self.on_look = look_away
        self.options = options
        self.text_dim: int = size.text["d_model"]
        self.vocabulary: int = size.text["vocab_size"]
        transformer = build_transformer(
            size, options.device, options.dtype, seed=options.seed, replace_linear=replace_linear
        )
        install_causal_attention(transformer)
        vae = build_vae(size, options.device, choose_vae_dtype(options.dtype, options.device), seed=options.seed)
        if options.fused_vae:
            speed_up_vae(vae)
        self.pipe = make_causal_wan_pipeline()
        self.pipe.update_components(transformer=transformer, vae=vae)
        if options.tiny_decoder:
            decoder = TinyDecoder(TinyDecoderConfig(latent_channels=size.transformer["in_channels"]))
            decoder = decoder.eval().requires_grad_(False).to(options.device, vae.dtype)
            speed_up_decoder(decoder)
            self.pipe.update_components(decoder=decoder)
        if options.text_encoder:
            encoder = build_text_encoder(size, options.device, options.dtype, seed=options.seed)
            self.pipe.update_components(text_encoder=encoder)

    def use_backend(self, backend: str) -> None:
        """Switch the attention backend.

        Raises:
            ValueError: it does not run here.
        """
        check_attention_backend(backend, self.device, dtype=self.options.dtype)
        self.recipe = replace(self.recipe, attention_backend=backend)
        causal_attention_of(self.pipe.transformer).use_backend(backend)

    def check_settings(self, settings: StreamSettings) -> None:
        """Sizes must be multiples of the family's step."""
        CAUSAL_WAN_21.geometry.check_size(settings.width, settings.height)

    def start(self, settings: StreamSettings) -> dict[str, Any]:
        """The prompt's embeddings, as if it had been encoded."""
        return {"prompt_embeds": self.embed_prompt(), "encoded_prompt": PROMPT, "prompt_tokens_cut": 0}

    def make_generator(self, seed: int) -> torch.Generator:
        """A CPU generator, like that of the built-in pipeline, unless the options say otherwise."""
        return torch.Generator(self.device if self.options.device_noise else "cpu").manual_seed(seed)

    def encode_prompt(self, state: PipelineState, prompt: str) -> None:
        """Do nothing: `start` has put the embeddings into the state."""

    @property
    def saving(self) -> OthersOnly:
        """Nothing of its own: what does not fit is to be seen."""
        return OthersOnly(PlainResidency(), self.device)

    def what_would_fit(self, settings: StreamSettings) -> str:
        """Unknown."""
        return "smaller options"

    def bring_components(self, settings: StreamSettings) -> None:
        """Do nothing: they are on the device."""

    def is_resident(self) -> bool:
        """Always."""
        return True

    def held_masks(self) -> Mapping[str, object]:
        """Those of the transformer."""
        return block_masks_of(self.pipe.transformer)

    def explain_not_finite(self) -> str | None:
        """Nothing: the weights are random numbers, and finite."""
        return None

    def release(self) -> None:
        """Delete every component."""
        for name in ("transformer", "vae", "decoder", "text_encoder"):
            setattr(self.pipe, name, None)

    @torch.no_grad()
    def embed_prompt(self, seed: int = 1) -> torch.Tensor:
        """[1, 512, text_dim] of random words, zero after the prompt's end; by the text encoder where there is one."""
        encoder = getattr(self.pipe, "text_encoder", None)
        generator = torch.Generator(self.device).manual_seed(seed)
        embeds = torch.zeros(1, DEFAULT_TEXT_TOKENS, self.text_dim, device=self.device, dtype=self.options.dtype)
        if encoder is None:
            shape = (1, _PROMPT_TOKENS, self.text_dim)
            embeds[:, :_PROMPT_TOKENS] = torch.randn(shape, device=self.device, generator=generator)
            return embeds
        ids = torch.randint(2, self.vocabulary, (1, DEFAULT_TEXT_TOKENS), device=self.device, generator=generator)
        mask = (torch.arange(DEFAULT_TEXT_TOKENS, device=self.device) < _PROMPT_TOKENS).long()[None]
        encoded = encoder(ids * mask, mask).last_hidden_state
        embeds[:, :_PROMPT_TOKENS] = encoded[:, :_PROMPT_TOKENS]
        return embeds
