"""Modular block: latents become pictures, on the CPU."""

from __future__ import annotations

from collections import deque
from typing import Any

import torch
from diffusers import AutoencoderKLWan
from diffusers.modular_pipelines import ModularPipeline, ModularPipelineBlocks, PipelineState
from diffusers.modular_pipelines.modular_pipeline_utils import ComponentSpec, InputParam, OutputParam

from ..vae.banded_decoder import DecodeBounds
from ..vae.stream_decoder import StreamDecoder
from ..vae.streaming_vae import DecoderCache
from ..vae.tiny_decoder import TinyDecoder
from .host_pictures import HostPictures
from .names import MODEL_NAME
from .prepare_steps import State


class DecodeBlockStep(ModularPipelineBlocks):
    """Decode the block frame by frame with the stream's decoder cache; its pictures move to the CPU at once."""

    model_name = MODEL_NAME

    @property
    def description(self) -> str:
        """What the block does."""
        return "Decodes the block's latents with the decoder cache carried across blocks."

    @property
    def expected_components(self) -> list[ComponentSpec]:
        """The VAE, and what may decode in its place."""
        return [ComponentSpec("vae", AutoencoderKLWan), ComponentSpec("decoder", TinyDecoder)]

    @property
    def inputs(self) -> list[InputParam]:
        """Latents, the caches, and how decoding saves memory."""
        return [
            InputParam("latents", required=True, type_hint=torch.Tensor),
            InputParam("decoder_cache", required=True, type_hint=DecoderCache),
            InputParam("frame_cache_context", required=True, type_hint=deque),
            InputParam("decode_bands", type_hint=int, default=1, description="of rows, see `DecodeBounds`"),
            InputParam("decoder_cache_in_ram", type_hint=bool, default=False, description="see `DecodeBounds`"),
            InputParam("show_pictures", description="a `ShowPictures`, called as latent frames are decoded; or None"),
        ]

    @property
    def intermediate_outputs(self) -> list[OutputParam]:
        """The pictures."""
        return [
            OutputParam("videos", type_hint=torch.Tensor, description="uint8, CPU, [1, F, height, width, 3]"),
            OutputParam("pictures_finite", type_hint=torch.Tensor, description="bool: no NaN before rounding"),
        ]

    @torch.no_grad()
    def __call__(self, components: ModularPipeline, state: PipelineState) -> State:
        """Run the block."""
        block_state = self.get_block_state(state)
        frame_cache: deque[torch.Tensor] = block_state.frame_cache_context
        bounds = DecodeBounds(block_state.decode_bands, block_state.decoder_cache_in_ram)
        decoder = StreamDecoder.of(components)
        pictures = HostPictures(_count_pictures(components.vae, block_state), block_state.show_pictures)
        for latent in block_state.latents.split(1, dim=2):
            pixels = decoder.decode(latent, block_state.decoder_cache, bounds)
            for frame in pixels.unbind(2)[-(frame_cache.maxlen or 0) :]:
                # Cloned: a view in the deque would keep all frames of its chunk.
                frame_cache.append(frame.clone())
            pictures.add(pixels)
        # Whether they are finite stays on the device: it is read after `take` has waited, so reading it adds no wait.
        block_state.videos, block_state.pictures_finite = pictures.take()
        self.set_block_state(state, block_state)
        return components, state


def _count_pictures(vae: AutoencoderKLWan, block_state: Any) -> int:  # noqa: ANN401
    """How many the block has: a stream's first latent frame is one picture, and every other as many as the VAE says."""
    frame = int(vae.config.scale_factor_temporal)
    return frame * block_state.latents.shape[2] - (frame - 1 if block_state.decoder_cache.latent_frames == 0 else 0)
