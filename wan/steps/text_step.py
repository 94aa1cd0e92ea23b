"""Modular block: the prompt becomes text embeddings, once per prompt."""

from __future__ import annotations

import logging

import torch
from diffusers.modular_pipelines import ModularPipeline, ModularPipelineBlocks, PipelineState
from diffusers.modular_pipelines.modular_pipeline_utils import ComponentSpec, InputParam, OutputParam
from diffusers.modular_pipelines.wan.encoders import get_t5_prompt_embeds, prompt_clean
from transformers import AutoTokenizer, UMT5EncoderModel

from .names import MODEL_NAME

logger = logging.getLogger(__name__)

DEFAULT_TEXT_TOKENS = 512


def count_tokens_cut(tokenizer: AutoTokenizer, prompt: str, max_tokens: int) -> int:
    """How many tokens `prompt` has beyond `max_tokens`; 0 when it fits."""
    tokens = tokenizer(prompt_clean(prompt), truncation=False, verbose=False).input_ids
    return max(0, len(tokens) - max_tokens)


class EncodePromptStep(ModularPipelineBlocks):
    """Encode the prompt unless the state already holds its embeddings."""

    model_name = MODEL_NAME

    @property
    def description(self) -> str:
        """What the block does."""
        return "Encodes the prompt with UMT5 when it differs from the one already encoded."

    @property
    def expected_components(self) -> list[ComponentSpec]:
        """Text encoder and tokenizer."""
        return [ComponentSpec("text_encoder", UMT5EncoderModel), ComponentSpec("tokenizer", AutoTokenizer)]

    @property
    def inputs(self) -> list[InputParam]:
        """The prompt and what is kept of the last one."""
        return [
            InputParam("prompt", required=True, type_hint=str, description="A string or a list of one string."),
            InputParam("max_sequence_length", type_hint=int, default=DEFAULT_TEXT_TOKENS),
            InputParam("encoded_prompt", type_hint=str),
            InputParam("prompt_embeds", type_hint=torch.Tensor),
            InputParam("prompt_tokens_cut", type_hint=int, default=0),
        ]

    @property
    def intermediate_outputs(self) -> list[OutputParam]:
        """The embeddings, the prompt they belong to, and how much of it did not fit."""
        return [
            OutputParam(
                "prompt_embeds", type_hint=torch.Tensor, description="[1, or a block's frames, text tokens, text_dim]"
            ),
            OutputParam("encoded_prompt", type_hint=str),
            OutputParam("prompt_tokens_cut", type_hint=int),
        ]

    @torch.no_grad()
    def __call__(self, components: ModularPipeline, state: PipelineState) -> tuple[ModularPipeline, PipelineState]:
        """Run the block."""
        block_state = self.get_block_state(state)
        prompt = single_prompt(block_state.prompt)
        if block_state.prompt_embeds is None or prompt != block_state.encoded_prompt:
            limit = block_state.max_sequence_length
            cut = count_tokens_cut(components.tokenizer, prompt, limit)
            if cut:
                logger.warning(
                    "The prompt is %d tokens longer than the %d the text encoder takes; its end is cut off.",
                    cut,
                    limit,
                )
            block_state.prompt_embeds = get_t5_prompt_embeds(
                components.text_encoder, components.tokenizer, prompt, limit, components.text_encoder.device
            )
            block_state.encoded_prompt = prompt
            block_state.prompt_tokens_cut = cut
        self.set_block_state(state, block_state)
        return components, state


def single_prompt(prompt: str | list[str]) -> str:
    """The one prompt of a stream.

    Raises:
        ValueError: a list of another length than 1.
    """
    if isinstance(prompt, str):
        return prompt
    if len(prompt) != 1:
        raise ValueError(f"prompt is a list of {len(prompt)}: a stream takes one prompt at a time.")
    return prompt[0]
