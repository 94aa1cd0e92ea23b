"""What a call of the pipeline left for its caller: pictures, if the block is usable."""

from __future__ import annotations

from collections.abc import Callable, MutableMapping
from dataclasses import dataclass
from typing import Any

import torch

from .frames import to_uint8_frames


class BlockFailedError(RuntimeError):
    """A block is unusable; the blocks before it are good."""

    # Programs that show errors to users put the module before the name, unless it is this one.
    __module__ = "builtins"


@dataclass(frozen=True)
class StreamBlock:
    """One block of the stream.

    Attributes:
        index: 0 for the first.
        prompt: of the block; of a mix `BlockPrompt.name`.
        frames: uint8 [F, height, width, 3] on the CPU.
        seconds: wall time of the whole call.
        prompt_tokens_cut: how many tokens of the prompt the text encoder cut off.
    """

    index: int
    prompt: str
    frames: torch.Tensor
    seconds: float
    prompt_tokens_cut: int


def check_finite(state: MutableMapping[str, Any], block: int, explain: Callable[[], str | None]) -> None:
    """Raise BlockFailedError for latents or pictures that are not finite.

    Args:
        state: after the call.
        block: its index, from 0.
        explain: says why, and what to do, where it knows.
    """
    latents = state.get("current_denoised_latents")
    pictures_finite = state.get("pictures_finite")
    if isinstance(latents, torch.Tensor) and not torch.isfinite(latents).all():
        what = "latents"
    elif pictures_finite is not None and not pictures_finite:
        what = "pictures"
    else:
        return
    why = explain() or "try dtype bfloat16 or float32, or another attention backend"
    raise BlockFailedError(
        f"block {block + 1} has NaN or infinite {what}: the {block} blocks before it are kept; {why}."
    )


def take_frames(state: MutableMapping[str, Any], block: int) -> torch.Tensor:
    """The pictures of block `block`, uint8 [F, height, width, 3] on the CPU; they leave the state once they are there.

    Raises:
        BlockFailedError: there are none, or they cannot be converted.
    """
    videos = state.get("videos")
    if videos is None:
        raise BlockFailedError(
            f"block {block + 1} returned no 'videos': the pipeline's blocks do not follow the contract "
            "of a streaming pipeline."
        )
    try:
        frames = to_uint8_frames(videos)
    except ValueError as error:
        raise BlockFailedError(f"block {block + 1}: {error}") from error
    del state["videos"]
    return frames
