"""What directs a stream from outside: prompts, pictures and a stream to go on from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from .start_pictures import StartPictures
from .video_input import VideoInput


@dataclass(frozen=True)
class Direction:
    """What a stream shows, block by block.

    Attributes:
        prompt_of: from block index to prompt.
        embeds: of the prompt, [1, text tokens, text width], zero where nothing is said; every block is made with them
            and `prompt_of` is not asked. None encodes the prompts.
        start: pictures that the stream goes on from; None starts with nothing.
        video: what each block is made from; None makes each from noise.
    """

    prompt_of: Callable[[int], str]
    embeds: torch.Tensor | None = None
    start: StartPictures | None = None
    video: VideoInput | None = None

    @classmethod
    def constant(cls, prompt: str) -> Direction:
        """The same prompt for every block."""
        return cls(lambda _: prompt)
