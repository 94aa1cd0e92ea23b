"""Modular block of video to video: the input becomes latents."""

from __future__ import annotations

import torch
from diffusers import AutoencoderKLWan
from diffusers.modular_pipelines import ModularPipeline, ModularPipelineBlocks, PipelineState
from diffusers.modular_pipelines.modular_pipeline_utils import ComponentSpec, InputParam, OutputParam

from ..vae.video_encoder import VideoEncoder
from .names import MODEL_NAME
from .prepare_steps import State


class EncodeInputStep(ModularPipelineBlocks):
    """Encode the input pictures of the block, if there are any, with the encoder's cache carried across blocks."""

    model_name = MODEL_NAME

    @property
    def description(self) -> str:
        """What the block does."""
        return "Encodes the block's part of an input video; does nothing without one."

    @property
    def expected_components(self) -> list[ComponentSpec]:
        """The VAE."""
        return [ComponentSpec("vae", AutoencoderKLWan)]

    @property
    def inputs(self) -> list[InputParam]:
        """Pictures, the encoder of the blocks before, and how long the block is."""
        return [
            InputParam("input_pictures", type_hint=torch.Tensor, description="uint8 [F, height, width, 3]"),
            InputParam("input_encoder", type_hint=VideoEncoder),
            InputParam("num_frames_per_block", type_hint=int, default=3),
            InputParam("stream_position", type_hint=int, default=0),
            InputParam("frame_cache_context", description="pictures that a video behind them follows on"),
        ]

    @property
    def intermediate_outputs(self) -> list[OutputParam]:
        """Latents of the block, and the encoder for the next."""
        return [
            OutputParam("input_latents", type_hint=torch.Tensor, description="float32; None without an input"),
            OutputParam("input_encoder", type_hint=VideoEncoder),
        ]

    @torch.no_grad()
    def __call__(self, components: ModularPipeline, state: PipelineState) -> State:
        """Run the block."""
        block_state = self.get_block_state(state)
        pictures: torch.Tensor | None = block_state.input_pictures
        block_state.input_latents = None
        if pictures is not None:
            encoder = block_state.input_encoder
            if encoder is None:
                shown = block_state.frame_cache_context if block_state.stream_position else None
                encoder = VideoEncoder.behind(components.vae, shown or ())
            latents = encoder.encode(components.vae, pictures)
            if latents.shape[2] != block_state.num_frames_per_block:
                raise ValueError(
                    f"input_pictures are {len(pictures)}, which make {latents.shape[2]} latent frames, and a block has "
                    f"{block_state.num_frames_per_block}: give one picture for the video's first latent frame and 4 "
                    "for every other."
                )
            block_state.input_encoder, block_state.input_latents = encoder, latents
        self.set_block_state(state, block_state)
        return components, state
