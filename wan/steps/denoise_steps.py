"""Modular blocks that denoise a block of latents and write its final keys."""

from __future__ import annotations

import torch
from diffusers import WanTransformer3DModel
from diffusers.modular_pipelines import ModularPipeline, ModularPipelineBlocks, PipelineState
from diffusers.modular_pipelines.modular_pipeline_utils import ComponentSpec, InputParam, OutputParam

from ...families.kv_policies import RECOMPUTE
from ..transformer.attention_passes import CausalPass, make_key_bias
from ..transformer.causal_transformer import predict_velocity, predict_with_context
from ..transformer.cross_attention_cache import CrossAttentionCache
from ..transformer.kv_cache import DeferredBlock, KVCache
from .context_policies import find_context_policy
from .names import MODEL_NAME
from .prepare_steps import State, draw_noise


class DenoiseBlockStep(ModularPipelineBlocks):
    """Few-step denoising: predict x0, add noise to the next sigma, repeat; the last x0 is the block."""

    model_name = MODEL_NAME

    @property
    def description(self) -> str:
        """What the block does."""
        return "Denoises the block's latents in a few steps, attending to the past frames in the KV cache."

    @property
    def expected_components(self) -> list[ComponentSpec]:
        """The transformer."""
        return [ComponentSpec("transformer", WanTransformer3DModel)]

    @property
    def inputs(self) -> list[InputParam]:
        """Noise, schedule, caches, place in time."""
        return [
            InputParam("latents", required=True, type_hint=torch.Tensor),
            InputParam("schedule", required=True),
            InputParam("kv_cache", required=True, type_hint=KVCache),
            InputParam("crossattn_cache", required=True, type_hint=CrossAttentionCache),
            InputParam("frame_offset", required=True, type_hint=int),
            InputParam("context_latents", type_hint=torch.Tensor, description="whose keys the first step computes"),
            InputParam("attention_bias", type_hint=float, default=1.0),
            InputParam("generator", type_hint=torch.Generator),
        ]

    @property
    def intermediate_outputs(self) -> list[OutputParam]:
        """The denoised latents; the context is used up."""
        return [
            OutputParam("latents", type_hint=torch.Tensor, description="float32, denoised"),
            OutputParam("context_latents", description="None"),
        ]

    @torch.no_grad()
    def __call__(self, components: ModularPipeline, state: PipelineState) -> State:
        """Run the block."""
        block_state = self.get_block_state(state)
        latents: torch.Tensor = block_state.latents
        schedule = block_state.schedule
        if not schedule.sigmas:
            # The block is its input; where the first step would have taken the context along, nobody needs its keys.
            block_state.context_latents = None
            self.set_block_state(state, block_state)
            return components, state
        cache: KVCache = block_state.kv_cache
        context: torch.Tensor | None = block_state.context_latents
        tokens = latents.shape[2] * cache.tokens_per_frame
        context_tokens = 0 if context is None else context.shape[2] * cache.tokens_per_frame
        dropped = cache.next_window(context_tokens, tokens).dropped
        causal_pass = CausalPass(
            cache,
            block_state.crossattn_cache,
            frame_offset=block_state.frame_offset,
            key_bias=make_key_bias(
                block_state.attention_bias,
                past_tokens=cache.length + context_tokens - dropped,
                capacity=cache.capacity,
                tokens_per_frame=cache.tokens_per_frame,
                like=block_state.crossattn_cache.keys[0],
            ),
        )
        if context is None:
            velocity = predict_velocity(components.transformer, latents, schedule.timesteps[0], causal_pass)
        else:
            velocity = predict_with_context(
                components.transformer, context, latents, schedule.timesteps[0], causal_pass
            )
            cache.commit(context_tokens)
            if dropped:
                cache.begin_block(tokens)
            block_state.context_latents = None
        denoised = latents - schedule.sigmas[0] * velocity
        # Draws the noise of all later steps while the device computes the first.
        noises = draw_noise(
            tuple(latents.shape),
            count=len(schedule.sigmas) - 1,
            generator=block_state.generator,
            device=latents.device,
        )
        for timestep, sigma, noise in zip(schedule.timesteps[1:], schedule.sigmas[1:], noises, strict=True):
            noised = (1.0 - sigma) * denoised + sigma * noise
            velocity = predict_velocity(components.transformer, noised, timestep, causal_pass)
            denoised = noised - sigma * velocity
        block_state.latents = denoised
        self.set_block_state(state, block_state)
        return components, state


class RememberBlockStep(ModularPipelineBlocks):
    """Keep what the next block needs, and advance the stream's position past this block."""

    model_name = MODEL_NAME

    @property
    def description(self) -> str:
        """What the block does."""
        return "Keeps the latest latents as context, and the block's clean keys where the policy does (rolling)."

    @property
    def expected_components(self) -> list[ComponentSpec]:
        """The transformer."""
        return [ComponentSpec("transformer", WanTransformer3DModel)]

    @property
    def inputs(self) -> list[InputParam]:
        """The denoised latents, the policy, the place in time and the caches."""
        return [
            InputParam("latents", required=True, type_hint=torch.Tensor),
            InputParam("stream_position", required=True, type_hint=int),
            InputParam("kv_policy", type_hint=str, default=RECOMPUTE),
            InputParam("context_frames", type_hint=int, default=3),
            InputParam("kv_cache", required=True, type_hint=KVCache),
            InputParam("crossattn_cache", required=True, type_hint=CrossAttentionCache),
            InputParam("frame_offset", required=True, type_hint=int),
            InputParam("prompt_embeds", required=True, type_hint=torch.Tensor),
            InputParam("encoded_prompt", required=True, type_hint=str),
            InputParam("current_denoised_latents", type_hint=torch.Tensor),
            InputParam("sink_frames", type_hint=int, default=0),
            InputParam("sink_latents", type_hint=torch.Tensor),
            InputParam("fuse_context", type_hint=bool, default=False, description="leaves keys to the next block"),
        ]

    @property
    def intermediate_outputs(self) -> list[OutputParam]:
        """The latents of the latest frames, and how many there were."""
        return [
            OutputParam("stream_position", type_hint=int, description="latent frames before the next block"),
            OutputParam(
                "current_denoised_latents",
                type_hint=torch.Tensor,
                description="float32, the last max(context, block) latent frames",
            ),
            OutputParam(
                "sink_latents", type_hint=torch.Tensor, description="the stream's first `sink_frames` latent frames"
            ),
        ]

    @torch.no_grad()
    def __call__(self, components: ModularPipeline, state: PipelineState) -> State:
        """Run the block."""
        block_state = self.get_block_state(state)
        latents: torch.Tensor = block_state.latents
        find_context_policy(block_state.kv_policy).finish_block(
            components.transformer,
            DeferredBlock(latents, block_state.frame_offset, block_state.encoded_prompt, block_state.prompt_embeds),
            block_state.kv_cache,
            block_state.crossattn_cache,
            defers=block_state.fuse_context,
        )
        past = block_state.current_denoised_latents if block_state.stream_position else None
        history = latents if past is None else torch.cat([past.to(latents), latents], dim=2)
        if block_state.sink_frames and block_state.stream_position < block_state.sink_frames:
            block_state.sink_latents = history[:, :, : block_state.sink_frames].clone()
        block_state.stream_position += latents.shape[2]
        keep = max(block_state.context_frames, latents.shape[2])
        # Cloned: a view would keep the whole concatenation alive.
        block_state.current_denoised_latents = history[:, :, -keep:].clone()
        self.set_block_state(state, block_state)
        return components, state
