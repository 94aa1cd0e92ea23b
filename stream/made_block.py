"""What a call of the pipeline has made, checked and taken out of the state."""

from __future__ import annotations

import torch

from .frames import to_uint8_frames
from .state import StreamState
from .stream_pipeline import StreamPipeline


class BlockFailedError(RuntimeError):
    """A block is unusable; the blocks before it are good."""

    # Programs that show errors to users put the module before the name, unless it is this one.
    __module__ = "builtins"


def check_finite(state: StreamState, pipeline: StreamPipeline, block: int) -> None:
    """Raise BlockFailedError if latents or pictures of block `block`, from 0, are not finite."""
    latents = state.get("current_denoised_latents")
    pictures_finite = state.get("pictures_finite")
    if isinstance(latents, torch.Tensor) and not torch.isfinite(latents).all():
        what = "latents"
    elif pictures_finite is not None and not pictures_finite:
        what = "pictures"
    else:
        return
    why = pipeline.explain_not_finite() or "try dtype bfloat16 or float32, or another attention backend"
    raise BlockFailedError(
        f"block {block + 1} has NaN or infinite {what}: the {block} blocks before it are kept; {why}."
    )


def take_frames(state: StreamState, block: int) -> torch.Tensor:
    """The pictures of block `block`, uint8 [F, height, width, 3] on the CPU; they leave the state once they are there.

    Raises:
        BlockFailedError: there are none, or they cannot be converted.
    """
    videos = state.get("videos")
    if videos is None:
        raise BlockFailedError(
            f"block {block + 1} returned no 'videos': the pipeline's blocks do not follow the contract of a streaming "
            "pipeline."
        )
    try:
        frames = to_uint8_frames(videos)
    except ValueError as error:
        raise BlockFailedError(f"block {block + 1}: {error}") from error
    del state.values["videos"]
    return frames
