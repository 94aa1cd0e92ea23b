"""Modular blocks that run before a block is denoised: schedule, caches, noise."""

from __future__ import annotations

from collections import deque
from typing import Any

import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from diffusers.modular_pipelines import ModularPipeline, ModularPipelineBlocks, PipelineState
from diffusers.modular_pipelines.modular_pipeline_utils import ComponentSpec, InputParam, OutputParam

from ...families.kv_policies import KV_PLAIN, RECOMPUTE
from ...families.step_list import StepList
from ..transformer.causal_transformer import (
    allocate_cross_cache,
    allocate_kv_cache,
    reads_8_bits,
    weight_device,
)
from ..transformer.cross_attention_cache import CrossAttentionCache
from ..transformer.kv_cache import KVCache
from ..vae.stream_decoder import StreamDecoder
from ..vae.streaming_vae import DecoderCache
from .clean_keys import take_prompt
from .context_policies import find_packing, frame_cache_length
from .few_step_schedule import NO_STEPS, FewStepSchedule, make_few_step_schedule, make_listed_schedule
from .names import MODEL_NAME
from .noised_input import noise_input

State = tuple[ModularPipeline, PipelineState]


def draw_noise(
    shape: tuple[int, ...], *, count: int, generator: torch.Generator | None, device: torch.device
) -> torch.Tensor:
    """Draw `count` noise tensors one after another; the host does not wait for the device.

    Args:
        shape: of one.
        count: how many.
        generator: draws on its own device (a CPU generator gives every device the same values); None draws on `device`.
        device: of the result.

    Returns:
        Float32 [count, *shape]. Float32 because sigma * noise sums in bfloat16 would lose the last steps' detail.
    """
    source = device if generator is None else generator.device
    # A copy from pageable memory would wait for all work queued on the device.
    pinned = source.type == "cpu" and device.type == "cuda"
    noise = torch.empty((count, *shape), dtype=torch.float32, device=source, pin_memory=pinned)
    for one in noise:
        # Drawn one at a time: a single draw gives different values unless a tensor's size is a multiple of 16.
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
        """Place in time; steps or a list of timesteps, another for the first block; shift and strength."""
        return [
            InputParam("stream_position", required=True, type_hint=int),
            InputParam("timesteps", type_hint=StepList, description="in the place of `num_inference_steps`"),
            InputParam("first_block_timesteps", type_hint=StepList, description="of a block without a past"),
            InputParam("num_inference_steps", type_hint=int, default=4),
            InputParam("shift", type_hint=float, default=5.0),
            InputParam("strength", type_hint=float, default=1.0, description="0 makes no pass: see `input_pictures`"),
        ]

    @property
    def intermediate_outputs(self) -> list[OutputParam]:
        """The schedule."""
        return [OutputParam("schedule", description="FewStepSchedule")]

    def __call__(self, components: ModularPipeline, state: PipelineState) -> State:
        """Run the block."""
        block_state = self.get_block_state(state)
        listed = block_state.timesteps
        if block_state.stream_position == 0 and block_state.first_block_timesteps is not None:
            listed = block_state.first_block_timesteps
        scale = {"strength": block_state.strength, "shift": block_state.shift}
        if block_state.strength == 0:
            block_state.schedule = NO_STEPS
        elif listed is None:
            block_state.schedule = make_few_step_schedule(block_state.num_inference_steps, **scale)
        else:
            block_state.schedule = make_listed_schedule(listed, **scale)
        self.set_block_state(state, block_state)
        return components, state


_OF_ONE_STREAM = (
    "stream_position",
    "kv_cache",
    "crossattn_cache",
    "decoder_cache",
    "frame_cache_context",
    "sink_latents",
    "input_encoder",
)


class PrepareCachesStep(ModularPipelineBlocks):
    """Set the block's position in the stream; allocate missing caches; recompute the keys of a changed prompt.

    A state with caches, latents and a `stream_position` continues from there. A state without a position, as in the
    usual loop over a modular pipeline, takes it from `block_idx` at the first call and keeps it from then on. A
    `block_idx` of 0 after other blocks starts a new stream.
    """

    model_name = MODEL_NAME

    @property
    def description(self) -> str:
        """What the block does."""
        return "Allocates KV, cross-attention and decoder caches where absent, and keeps the prompt's keys up to date."

    @property
    def expected_components(self) -> list[ComponentSpec]:
        """Transformer and VAE."""
        return [ComponentSpec("transformer", WanTransformer3DModel), ComponentSpec("vae", AutoencoderKLWan)]

    @property
    def inputs(self) -> list[InputParam]:
        """Place in time, sizes, and the caches of the block before."""
        return [
            InputParam("block_idx", type_hint=int),
            InputParam("stream_position", type_hint=int, description="latent frames before this block"),
            InputParam("next_block_idx", type_hint=int, description="`block_idx` of the block before, plus 1"),
            InputParam("height", required=True, type_hint=int),
            InputParam("width", required=True, type_hint=int),
            InputParam("num_frames_per_block", type_hint=int, default=3),
            InputParam("context_frames", type_hint=int, default=3),
            InputParam("sink_frames", type_hint=int, default=0),
            InputParam("kv_policy", type_hint=str, default=RECOMPUTE),
            InputParam("kv_format", type_hint=str, default=KV_PLAIN),
            InputParam("attention_bias", type_hint=float, default=1.0),
            InputParam("prompt_embeds", required=True, type_hint=torch.Tensor),
            InputParam("encoded_prompt", required=True, type_hint=str),
            InputParam("kv_cache"),
            InputParam("crossattn_cache"),
            InputParam("decoder_cache"),
            InputParam("frame_cache_context"),
            InputParam("sink_latents"),
            InputParam("keys_are_stale", type_hint=bool, default=False, description="of a prompt that has gone"),
            InputParam("input_encoder"),
        ]

    @property
    def intermediate_outputs(self) -> list[OutputParam]:
        """Place in time and caches."""
        return [
            OutputParam("stream_position", type_hint=int, description="latent frames before this block"),
            OutputParam("next_block_idx", type_hint=int),
            OutputParam("kv_cache", type_hint=KVCache),
            OutputParam("crossattn_cache", type_hint=CrossAttentionCache),
            OutputParam("decoder_cache", type_hint=DecoderCache),
            OutputParam("frame_cache_context", type_hint=deque, description="pixel frames [1, 3, height, width]"),
        ]

    def __call__(self, components: ModularPipeline, state: PipelineState) -> State:
        """Run the block."""
        block_state = self.get_block_state(state)
        if block_state.block_idx == 0 and block_state.next_block_idx:
            # The caller counts from 0 again: a new stream in the state of another.
            for entry in _OF_ONE_STREAM:
                setattr(block_state, entry, None)
        block_state.next_block_idx = (block_state.block_idx or 0) + 1
        if block_state.stream_position is None:
            block_state.stream_position = (block_state.block_idx or 0) * block_state.num_frames_per_block
        if block_state.stream_position < 0:
            raise ValueError(
                f"stream_position is {block_state.stream_position}: give the number of latent frames before the block, "
                "0 or more."
            )
        self._allocate_absent(components, block_state)
        if block_state.keys_are_stale:
            # They are all computed anew, those of a deferred block among them.
            block_state.kv_cache.deferred = None
        take_prompt(
            components.transformer,
            block_state.kv_cache,
            block_state.crossattn_cache,
            block_state.prompt_embeds,
            block_state.encoded_prompt,
        )
        self.set_block_state(state, block_state)
        return components, state

    def _allocate_absent(self, components: ModularPipeline, block_state: Any) -> None:  # noqa: ANN401
        if block_state.kv_cache is None:
            scale = components.vae.config.scale_factor_spatial
            context, block = block_state.context_frames, block_state.num_frames_per_block
            block_state.kv_cache = allocate_kv_cache(
                components.transformer,
                frames=context + block,
                latent_height=block_state.height // scale,
                latent_width=block_state.width // scale,
                sink_frames=block_state.sink_frames,
                packing=find_packing(block_state.kv_policy, block_state.kv_format, context, block),
                eight_bits=block_state.attention_bias == 1.0 and reads_8_bits(components.transformer),
            )
        if block_state.crossattn_cache is None:
            text_tokens = block_state.prompt_embeds.shape[1]
            block_state.crossattn_cache = allocate_cross_cache(components.transformer, text_tokens=text_tokens)
        if block_state.decoder_cache is None:
            block_state.decoder_cache = StreamDecoder.of(components).begin()
        pictures = block_state.frame_cache_context
        length = frame_cache_length(components.vae, block_state.context_frames)
        if getattr(pictures, "maxlen", None) != length:
            # Pictures given by the caller may be in a list, or in a deque of another length.
            block_state.frame_cache_context = deque(pictures or (), maxlen=length)


class PrepareNoiseStep(ModularPipelineBlocks):
    """Noise of the block, and as much of its input as the schedule leaves."""

    model_name = MODEL_NAME

    @property
    def description(self) -> str:
        """What the block does."""
        return "Draws the block's starting noise, and mixes it with its input, if there is one."

    @property
    def expected_components(self) -> list[ComponentSpec]:
        """Transformer and VAE."""
        return [ComponentSpec("transformer", WanTransformer3DModel), ComponentSpec("vae", AutoencoderKLWan)]

    @property
    def inputs(self) -> list[InputParam]:
        """Sizes, the generator, the schedule, and the latents of the input."""
        return [
            InputParam("height", required=True, type_hint=int),
            InputParam("width", required=True, type_hint=int),
            InputParam("num_frames_per_block", type_hint=int, default=3),
            InputParam("generator", type_hint=torch.Generator),
            InputParam("schedule", required=True, type_hint=FewStepSchedule),
            InputParam("input_latents", type_hint=torch.Tensor),
        ]

    @property
    def intermediate_outputs(self) -> list[OutputParam]:
        """What the block starts from."""
        return [OutputParam("latents", type_hint=torch.Tensor, description="[1, channels, frames, rows, columns]")]

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
        noise = draw_noise(shape, count=1, generator=block_state.generator, device=device)[0]
        block_state.latents = noise_input(noise, block_state.schedule, block_state.input_latents)
        self.set_block_state(state, block_state)
        return components, state
