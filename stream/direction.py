"""What directs a stream from outside: prompts, pictures and a stream to go on from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from .snapshot import StreamSnapshot


@dataclass(frozen=True)
class Direction:
    """What a stream shows, block by block.

    Attributes:
        prompt_of: from block index to prompt.
        embeds: of the prompt, [1, text tokens, text width], zero where nothing is said; every block is made with them
            and `prompt_of` is not asked. None encodes the prompts.
        go_on: the stream that this one continues; its blocks are not counted by `prompt_of`. None starts a new one.
    """

    prompt_of: Callable[[int], str]
    embeds: torch.Tensor | None = None
    go_on: StreamSnapshot | None = None

    @classmethod
    def constant(cls, prompt: str) -> Direction:
        """The same prompt for every block."""
        return cls(lambda _: prompt)
