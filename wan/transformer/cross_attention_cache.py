"""Keys and values of the prompt, computed once per prompt."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ...ops.few_key_attention import MOST_KEYS, FewKeys


@dataclass
class CrossAttentionCache:
    """Keys and values of the prompt for every layer, computed once per prompt.

    In a transition every latent frame of a block has a text of its own. They share the room of one: of each only the
    words are kept, and one token of padding.

    Attributes:
        keys: per layer [1, text tokens, heads, head_dim].
        values: per layer, the same shape.
        prompt: the prompt they were computed from; None while empty.
        few: how its words and one token of padding replace all tokens; None for a long prompt.
        texts: 1, or as many as a block has latent frames.
    """

    keys: list[torch.Tensor]
    values: list[torch.Tensor]
    prompt: str | None = None
    few: FewKeys | None = None
    texts: int = 1

    def has_room_for(self, texts: int, words: int) -> bool:
        """Whether so many texts of up to `words` words, each with a token of padding, have room."""
        return words < min(MOST_KEYS, self.keys[0].shape[1] // texts)

    def by_text(self, buffer: torch.Tensor) -> torch.Tensor:
        """A layer's buffer as [texts, tokens of each, heads, head_dim]."""
        if self.texts == 1:
            return buffer
        tokens = buffer.shape[1] // self.texts
        return buffer[0, : self.texts * tokens].unflatten(0, (self.texts, tokens))

    @classmethod
    def allocate(
        cls,
        *,
        layers: int,
        heads: int,
        head_dim: int,
        text_tokens: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> CrossAttentionCache:
        """Allocate room for a prompt of `text_tokens` tokens (padding included)."""
        shape = (1, text_tokens, heads, head_dim)
        return cls(
            keys=[torch.zeros(shape, device=device, dtype=dtype) for _ in range(layers)],
            values=[torch.zeros(shape, device=device, dtype=dtype) for _ in range(layers)],
        )
