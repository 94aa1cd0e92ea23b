"""Modular blocks that run before a block is denoised: schedule, caches, context, noise."""

from __future__ import annotations

from collections import deque
from typing import Any

import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from diffusers.modular_pipelines import ModularPipeline, ModularPipelineBlocks, PipelineState
from diffusers.modular_pipelines.modular_pipeline_utils import ComponentSpec, InputParam, OutputParam

from ..transformer.attention_passes import CausalPass
from ..transformer.causal_transformer import (
    allocate_cross_cache,
    allocate_kv_cache,
    fill_cross_cache,
    weight_device,
    write_keys,
)
from ..transformer.kv_cache import CrossAttentionCache, KVCache
from ..vae.streaming_vae import DecoderCache, encode_pixel_frame
from .few_step_schedule import make_few_step_schedule

RECOMPUTE = "recompute"
ROLLING = "rolling"
KV_POLICIES = (RECOMPUTE, ROLLING)
MODEL_NAME = "streamblocks-causal-wan"

State = tuple[ModularPipeline, PipelineState]


def frame_cache_length(context_frames: int) -> int:
    """Pixel frames that `context_frames` latent frames stand for: 1 + (context - 1) * 4."""
    return 1 + (context_frames - 1) * 4


def draw_noise(
    shape: tuple[int, ...], *, count: int, generator: torch.Generator | None, device: torch.device
) -> torch.Tensor:
    """Draw `count` noise tensors one after another; the host does not wait for the device.

    Args:
        shape: of one.
        count: how many.
        generator: draws on its own device, a CPU one the same values for every device; None draws on `device`.
        device: where they are needed.

    Returns:
        Float32 [count, *shape]. Float32 because sigma * noise sums in bfloat16 would lose the last steps' detail.
    """
    source = device if generator is None else generator.device
    # From pageable memory the copy would wait for everything queued on the device.
    pinned = source.type == "cpu" and device.type == "cuda"
    noise = torch.empty((count, *shape), dtype=torch.float32, device=source, pin_memory=pinned)
    for one in noise:
        # One at a time: a single draw of all has other values unless a tensor's size is a multiple of 16.
        one.normal_(generator=generator)
    return noise.to(device, non_blocking=pinned)


class SetScheduleStep(ModularPipelineBlocks):
    """Timesteps and sigmas of the block."""

    model_name = MODEL_NAME

    @property
    def description(self) -> str:
        """What the block does."""
        return "Builds the few-step schedule."

    @property
    def inputs(self) -> list[InputParam]:
        """Steps, shift and strength."""
        return [
            InputParam("num_inference_steps", type_hint=int, default=4),
            InputParam("shift", type_hint=float, default=5.0),
            InputParam("strength", type_hint=float, default=1.0),
        ]

    @property
    def intermediate_outputs(self) -> list[OutputParam]:
        """The schedule."""
        return [OutputParam("schedule", description="FewStepSchedule")]

    def __call__(self, components: ModularPipeline, state: PipelineState) -> State:
        """Run the block."""
        block_state = self.get_block_state(state)
        block_state.schedule = make_few_step_schedule(
            block_state.num_inference_steps, strength=block_state.strength, shift=block_state.shift
        )
        self.set_block_state(state, block_state)
        return components, state


class PrepareCachesStep(ModularPipelineBlocks):
    """Allocate the stream's caches at its first block; refill the prompt's keys when the prompt changed."""

    model_name = MODEL_NAME

    @property
    def description(self) -> str:
        """What the block does."""
        return "Allocates KV, cross-attention and decoder caches once, and keeps the prompt's keys up to date."

    @property
    def expected_components(self) -> list[ComponentSpec]:
        """Transformer and VAE."""
        return [ComponentSpec("transformer", WanTransformer3DModel), ComponentSpec("vae", AutoencoderKLWan)]

    @property
    def inputs(self) -> list[InputParam]:
        """Sizes, policy and the caches of the block before."""
        return [
            InputParam("block_idx", required=True, type_hint=int),
            InputParam("height", required=True, type_hint=int),
            InputParam("width", required=True, type_hint=int),
            InputParam("num_frames_per_block", type_hint=int, default=3),
            InputParam("context_frames", type_hint=int, default=3),
            InputParam("sink_frames", type_hint=int, default=0),
            InputParam("prompt_embeds", required=True, type_hint=torch.Tensor),
            InputParam("encoded_prompt", required=True, type_hint=str),
            InputParam("kv_cache"),
            InputParam("crossattn_cache"),
            InputParam("decoder_cache"),
            InputParam("frame_cache_context"),
        ]

    @property
    def intermediate_outputs(self) -> list[OutputParam]:
        """The caches."""
        return [
            OutputParam("kv_cache", type_hint=KVCache),
            OutputParam("crossattn_cache", type_hint=CrossAttentionCache),
            OutputParam("decoder_cache", type_hint=DecoderCache),
            OutputParam("frame_cache_context", type_hint=deque, description="pixel frames [1, 3, height, width]"),
        ]

    def __call__(self, components: ModularPipeline, state: PipelineState) -> State:
        """Run the block."""
        block_state = self.get_block_state(state)
        if block_state.block_idx == 0:
            self._allocate(components, block_state)
        elif block_state.kv_cache is None:
            raise ValueError(
                f"block_idx is {block_state.block_idx} but the state holds no caches: a stream starts at block 0."
            )
        if block_state.crossattn_cache.prompt != block_state.encoded_prompt:
            fill_cross_cache(
                components.transformer,
                block_state.crossattn_cache,
                block_state.prompt_embeds,
                block_state.encoded_prompt,
            )
        self.set_block_state(state, block_state)
        return components, state

    def _allocate(self, components: ModularPipeline, block_state: Any) -> None:  # noqa: ANN401
        scale = components.vae.config.scale_factor_spatial
        block_state.kv_cache = allocate_kv_cache(
            components.transformer,
            frames=block_state.context_frames + block_state.num_frames_per_block,
            latent_height=block_state.height // scale,
            latent_width=block_state.width // scale,
            sink_frames=block_state.sink_frames,
        )
        block_state.crossattn_cache = allocate_cross_cache(
            components.transformer, text_tokens=block_state.prompt_embeds.shape[1]
        )
        block_state.decoder_cache = DecoderCache.for_vae(components.vae)
        block_state.frame_cache_context = deque(maxlen=frame_cache_length(block_state.context_frames))


class RefillContextStep(ModularPipelineBlocks):
    """Bring the KV cache to the start of the block, as the policy says.

    `rolling` makes room for the block. `recompute` (Krea Realtime) forgets all keys and computes those of the
    context latents again, at t = 0 under a block-causal mask; once the window slides, the first context latent
    is the oldest cached picture encoded anew, because a latent frame is only meaningful behind its past.
    """

    model_name = MODEL_NAME

    @property
    def description(self) -> str:
        """What the block does."""
        return "Makes room in the KV cache (rolling) or recomputes it from the context latents (recompute)."

    @property
    def expected_components(self) -> list[ComponentSpec]:
        """Transformer and VAE."""
        return [ComponentSpec("transformer", WanTransformer3DModel), ComponentSpec("vae", AutoencoderKLWan)]

    @property
    def inputs(self) -> list[InputParam]:
        """Policy, sizes, caches and the latents of the past."""
        return [
            InputParam("block_idx", required=True, type_hint=int),
            InputParam("kv_policy", type_hint=str, default=RECOMPUTE),
            InputParam("context_frames", type_hint=int, default=3),
            InputParam("num_frames_per_block", type_hint=int, default=3),
            InputParam("kv_cache", required=True, type_hint=KVCache),
            InputParam("crossattn_cache", required=True, type_hint=CrossAttentionCache),
            InputParam("decoder_cache", required=True, type_hint=DecoderCache),
            InputParam("frame_cache_context", required=True, type_hint=deque),
            InputParam("current_denoised_latents", type_hint=torch.Tensor),
        ]

    @property
    def intermediate_outputs(self) -> list[OutputParam]:
        """Where the block stands in time for RoPE."""
        return [OutputParam("frame_offset", type_hint=int, description="latent frame of the block's first frame")]

    def __call__(self, components: ModularPipeline, state: PipelineState) -> State:
        """Run the block."""
        block_state = self.get_block_state(state)
        if block_state.kv_policy not in KV_POLICIES:
            raise ValueError(f"kv_policy is {block_state.kv_policy!r}: choose one of {', '.join(KV_POLICIES)}.")
        past_frames = block_state.block_idx * block_state.num_frames_per_block
        cache: KVCache = block_state.kv_cache
        if block_state.kv_policy == RECOMPUTE:
            cache.reset()
            block_state.frame_offset = min(past_frames, block_state.context_frames)
            if past_frames:
                self._recompute(components, block_state, past_frames)
        else:
            block_state.frame_offset = past_frames
            cache.begin_block(block_state.num_frames_per_block * cache.tokens_per_frame)
        self.set_block_state(state, block_state)
        return components, state

    def _recompute(self, components: ModularPipeline, block_state: Any, past_frames: int) -> None:  # noqa: ANN401
        context = block_state.current_denoised_latents[:, :, -block_state.context_frames :]
        if past_frames > block_state.context_frames:
            oldest = block_state.frame_cache_context[0].unsqueeze(2)
            statistics = block_state.decoder_cache.statistics
            first = encode_pixel_frame(components.vae, oldest, statistics).to(context.device)
            context = torch.cat([first, context[:, :, 1:]], dim=2)
        cache: KVCache = block_state.kv_cache
        block_tokens = block_state.num_frames_per_block * cache.tokens_per_frame
        causal_pass = CausalPass(
            cache,
            block_state.crossattn_cache,
            frame_offset=0,
            # None where the context is one block: a compiled layer then shares the graph of the stream's first block.
            causal_tokens=block_tokens if context.shape[2] > block_state.num_frames_per_block else None,
        )
        write_keys(components.transformer, context, 0.0, causal_pass)
        cache.commit(context.shape[2] * cache.tokens_per_frame)


class PrepareNoiseStep(ModularPipelineBlocks):
    """Noise of the block."""

    model_name = MODEL_NAME

    @property
    def description(self) -> str:
        """What the block does."""
        return "Draws the block's starting noise."

    @property
    def expected_components(self) -> list[ComponentSpec]:
        """Transformer and VAE."""
        return [ComponentSpec("transformer", WanTransformer3DModel), ComponentSpec("vae", AutoencoderKLWan)]

    @property
    def inputs(self) -> list[InputParam]:
        """Sizes and the generator."""
        return [
            InputParam("height", required=True, type_hint=int),
            InputParam("width", required=True, type_hint=int),
            InputParam("num_frames_per_block", type_hint=int, default=3),
            InputParam("generator", type_hint=torch.Generator),
        ]

    @property
    def intermediate_outputs(self) -> list[OutputParam]:
        """The noise."""
        return [OutputParam("latents", type_hint=torch.Tensor, description="[1, 16, frames, height/8, width/8]")]

    def __call__(self, components: ModularPipeline, state: PipelineState) -> State:
        """Run the block."""
        block_state = self.get_block_state(state)
        scale = components.vae.config.scale_factor_spatial
        shape = (
            1,
            components.transformer.config.in_channels,
            block_state.num_frames_per_block,
            block_state.height // scale,
            block_state.width // scale,
        )
        device = weight_device(components.transformer)
        block_state.latents = draw_noise(shape, count=1, generator=block_state.generator, device=device)[0]
        self.set_block_state(state, block_state)
        return components, state
