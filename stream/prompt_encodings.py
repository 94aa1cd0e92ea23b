"""Prompts of a stream as embeddings: all that are known beforehand are encoded at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from .block_prompt import BlockPrompt
from .conditioning import fit_tokens
from .foreign_limits import refuse_mixes
from .mixed_embeds import mix_embeds
from .state import StreamState

if TYPE_CHECKING:
    from .stream_pipeline import StreamPipeline


@dataclass(frozen=True)
class EncodedPrompt:
    """One prompt's embeddings.

    Attributes:
        embeds: [1, words, text width] on the CPU, without the padding behind the prompt's end.
        tokens: with the padding, as the model takes them.
        tokens_cut: how many tokens of the prompt were too many for the text encoder.
    """

    embeds: torch.Tensor
    tokens: int
    tokens_cut: int

    @classmethod
    def read(cls, state: StreamState) -> EncodedPrompt:
        """What a text step left in the state, [1, text tokens, text width]."""
        embeds: torch.Tensor = state.get("prompt_embeds")
        said = embeds[0].any(dim=-1).nonzero()
        words = int(said[-1]) + 1 if len(said) else 1
        # Cloned: a view would keep the padding.
        kept = embeds[:, :words].to("cpu", copy=True)
        return cls(kept, embeds.shape[1], state.get("prompt_tokens_cut", 0))


class PromptEncodings:
    """Gives the state of a stream the embeddings of each block's prompt.

    Args:
        pipeline: of the stream.
        ahead: prompts that are encoded together, before the first block; others when they come.
        frames_per_block: latent frames of a block, each of which has embeddings of its own in a transition.
    """

    def __init__(self, pipeline: StreamPipeline, ahead: Sequence[str], frames_per_block: int) -> None:
        self._pipeline = pipeline
        self._frames = frames_per_block
        self._ahead = tuple(ahead)
        self._encoded: Mapping[str, EncodedPrompt] = {}

    def put(self, state: StreamState, prompt: BlockPrompt) -> bool:
        """Set the embeddings of `prompt` in the state; returns whether that took any work.

        Raises:
            ValueError: the pipeline cannot mix prompts.
        """
        worked = False
        if self._ahead:
            self._encoded, self._ahead = self._pipeline.encode_prompts(self._ahead), ()
            worked = bool(self._encoded)
        known = state.get("encoded_prompt")
        if known == prompt.name:
            return worked
        missing = [text for text in prompt.texts if text not in self._encoded]
        if not missing:
            self._set_embeds(state, prompt)
        elif not prompt.is_mixed:
            self._pipeline.encode_prompt(state, missing[0])
        else:
            refuse_mixes(self._pipeline.recipe)
            self._encoded = {**self._encoded, **self._pipeline.encode_prompts(missing)}
            self._set_embeds(state, prompt)
        return worked or state.get("encoded_prompt") != known

    def _set_embeds(self, state: StreamState, prompt: BlockPrompt) -> None:
        used = [self._encoded[text] for text in prompt.texts]
        tokens = max(one.tokens for one in used)
        mixes = [
            mix_embeds([(self._encoded[text].embeds, share) for text, share in parts], prompt.interpolation)
            for parts in prompt.shares_by_frame(self._frames)
        ]
        embeds = torch.cat([fit_tokens(mixed, tokens) for mixed in mixes])
        state.values["prompt_embeds"] = embeds.to(self._pipeline.device)
        state.values["prompt_tokens_cut"] = max(one.tokens_cut for one in used)
        state.values["encoded_prompt"] = prompt.name
