"""The built-in causal Wan pipeline, assembled from its steps."""

from __future__ import annotations

from typing import ClassVar

from diffusers.modular_pipelines import ModularPipeline, SequentialPipelineBlocks
from diffusers.modular_pipelines.modular_pipeline_utils import OutputParam

from .decode_step import DecodeBlockStep
from .denoise_steps import DenoiseBlockStep, RememberBlockStep
from .encode_input_step import EncodeInputStep
from .names import MODEL_NAME
from .prepare_steps import PrepareCachesStep, PrepareNoiseStep, SetScheduleStep
from .refill_context_step import RefillContextStep
from .text_step import EncodePromptStep


class BeforeDenoiseBlocks(SequentialPipelineBlocks):
    """Caches, schedule, context and noise of one block."""

    model_name = MODEL_NAME
    block_classes: ClassVar = [
        PrepareCachesStep,
        SetScheduleStep,
        EncodeInputStep,
        RefillContextStep,
        PrepareNoiseStep,
    ]
    block_names: ClassVar = ["prepare_caches", "set_schedule", "encode_input", "refill_context", "prepare_noise"]

    @property
    def description(self) -> str:
        """What the blocks do."""
        return "Everything one block of the stream needs before it is denoised."


class DenoiseBlocks(SequentialPipelineBlocks):
    """Denoise one block and remember it."""

    model_name = MODEL_NAME
    block_classes: ClassVar = [DenoiseBlockStep, RememberBlockStep]
    block_names: ClassVar = ["denoise_block", "remember_block"]

    @property
    def description(self) -> str:
        """What the blocks do."""
        return "Denoises one block of the stream and keeps what the next needs."


class CausalWanBlocks(SequentialPipelineBlocks):
    """Causal Wan text-to-video, one block of latent frames per call."""

    model_name = MODEL_NAME
    block_classes: ClassVar = [EncodePromptStep, BeforeDenoiseBlocks, DenoiseBlocks, DecodeBlockStep]
    block_names: ClassVar = ["text_encoder", "before_denoise", "denoise", "decode"]

    @property
    def description(self) -> str:
        """What the pipeline does."""
        return "Block-autoregressive Wan: each call makes the next few latent frames of a stream."

    @property
    def outputs(self) -> list[OutputParam]:
        """The pictures of the block."""
        return [OutputParam("videos", description="uint8, CPU, [1, F, height, width, 3]")]


def make_causal_wan_pipeline() -> ModularPipeline:
    """A pipeline of the built-in blocks without components; add them with `update_components`."""
    return ModularPipeline(blocks=CausalWanBlocks())
