"""What ComfyUI's own text nodes put on their CONDITIONING socket, as embeddings of one prompt."""

from __future__ import annotations

import hashlib
from typing import Any

import torch

# What users read in the prompt's place where its embeddings are given.
GIVEN_PROMPT = "(from the conditioning)"


def name_embeds(embeds: torch.Tensor) -> str:
    """What stands for the prompt of these embeddings in a stream's state: equal for equal ones, and for no others."""
    values = embeds.detach().float().cpu().contiguous().numpy()
    return f"{GIVEN_PROMPT} {hashlib.sha256(values.tobytes()).hexdigest()[:16]}"


def read_conditioning(conditioning: Any) -> torch.Tensor:  # noqa: ANN401
    """The embeddings in a CONDITIONING, [1, text tokens, text width], on their device and in their dtype.

    A CONDITIONING is a list of pairs: embeddings, and a dict, in which an `attention_mask` may say which tokens are
    padding. What is padding is zero in what is returned.

    Raises:
        ValueError: it holds no prompt or several, no embeddings of that shape, or values that are not numbers.
    """
    count = len(conditioning) if isinstance(conditioning, list | tuple) else 0
    if count != 1:
        raise ValueError(
            f"conditioning holds {count} prompts: a stream takes one at a time; connect CLIP Text Encode directly, "
            "without combining or scheduling."
        )
    embeds, extra = conditioning[0][0], conditioning[0][1]
    shape = list(embeds.shape) if isinstance(embeds, torch.Tensor) else type(embeds).__name__
    if not isinstance(embeds, torch.Tensor) or embeds.ndim != 3 or embeds.shape[0] != 1 or not embeds.shape[1]:
        raise ValueError(
            f"conditioning holds {shape}, and a stream takes embeddings of one text, [1, tokens, width]: connect CLIP "
            "Text Encode with the text encoder that belongs to the model."
        )
    if not torch.isfinite(embeds).all():
        raise ValueError("conditioning holds NaN or infinite values: encode the text again, in another dtype.")
    mask = extra.get("attention_mask")
    if mask is None:
        return embeds
    if mask.numel() != embeds.shape[1]:
        raise ValueError(
            f"conditioning has {embeds.shape[1]} tokens and an attention mask of {mask.numel()}: encode the text again."
        )
    return embeds * mask.reshape(1, -1, 1).to(embeds)


def fit_tokens(embeds: torch.Tensor, tokens: int) -> torch.Tensor:
    """`embeds` [1, any tokens, width] with `tokens` tokens: padded with zeros, or cut."""
    missing = tokens - embeds.shape[1]
    return torch.nn.functional.pad(embeds, (0, 0, 0, missing)) if missing >= 0 else embeds[:, :tokens]
