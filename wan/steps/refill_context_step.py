"""The modular block that brings the KV cache to the start of a block."""

from __future__ import annotations

from collections import deque

import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from diffusers.modular_pipelines import ModularPipeline, ModularPipelineBlocks, PipelineState
from diffusers.modular_pipelines.modular_pipeline_utils import ComponentSpec, InputParam, OutputParam

from ...families.kv_policies import RECOMPUTE
from ..transformer.cross_attention_cache import CrossAttentionCache
from ..transformer.installed_attention import causal_attention_of
from ..transformer.kv_cache import KVCache
from ..vae.streaming_vae import DecoderCache
from .context_policies import Past, find_context_policy
from .few_step_schedule import FewStepSchedule
from .names import MODEL_NAME
from .prepare_steps import State


class RefillContextStep(ModularPipelineBlocks):
    """Bring the KV cache to the start of the block, as the policy says."""

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
        """Policy, place in time, sizes, caches and the latents of the past."""
        return [
            InputParam("stream_position", required=True, type_hint=int),
            InputParam("kv_policy", type_hint=str, default=RECOMPUTE),
            InputParam("context_frames", type_hint=int, default=3),
            InputParam("num_frames_per_block", type_hint=int, default=3),
            InputParam("kv_cache", required=True, type_hint=KVCache),
            InputParam("crossattn_cache", required=True, type_hint=CrossAttentionCache),
            InputParam("decoder_cache", required=True, type_hint=DecoderCache),
            InputParam("frame_cache_context", required=True, type_hint=deque),
            InputParam("current_denoised_latents", type_hint=torch.Tensor),
            InputParam("fuse_context", type_hint=bool, default=False, description="see `predict_with_context`"),
            InputParam("sink_latents", type_hint=torch.Tensor),
            InputParam("keys_are_stale", type_hint=bool, default=False, description="of a prompt that has gone"),
            InputParam("schedule", required=True, type_hint=FewStepSchedule),
        ]

    @property
    def intermediate_outputs(self) -> list[OutputParam]:
        """RoPE position of the block's first latent frame, and the context that its first step takes along."""
        return [
            OutputParam("frame_offset", type_hint=int, description="latent frame of the block's first frame"),
            OutputParam("context_latents", type_hint=torch.Tensor, description="None where the cache has their keys"),
            OutputParam("keys_are_stale", type_hint=bool, description="False: they are not any more"),
        ]

    def __call__(self, components: ModularPipeline, state: PipelineState) -> State:
        """Run the block."""
        block_state = self.get_block_state(state)
        past = Past(
            position=block_state.stream_position,
            block_frames=block_state.num_frames_per_block,
            context_frames=block_state.context_frames,
            kv_cache=block_state.kv_cache,
            cross_cache=block_state.crossattn_cache,
            latents=block_state.current_denoised_latents,
            pictures=block_state.frame_cache_context,
            statistics=block_state.decoder_cache.statistics,
            # The past and the block read other texts in a transition.
            fuses_context=block_state.fuse_context and block_state.crossattn_cache.texts == 1,
            sink=block_state.sink_latents,
            keys_are_stale=block_state.keys_are_stale,
            has_steps=bool(block_state.schedule.sigmas),
        )
        policy = find_context_policy(block_state.kv_policy)
        graphs = causal_attention_of(components.transformer).graphs
        if graphs is not None:
            graphs.begin_turn()
        start = policy.start_block(components.transformer, components.vae, past)
        block_state.frame_offset, block_state.context_latents = start.frame_offset, start.context
        block_state.keys_are_stale = False
        self.set_block_state(state, block_state)
        return components, state
