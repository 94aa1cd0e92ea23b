"""Pictures as pipelines return them, converted to one format."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch


def to_uint8_frames(videos: Any) -> torch.Tensor:  # noqa: ANN401
    """The first video of a pipeline's `videos` as uint8 [F, height, width, 3] on the CPU.

    Takes what diffusers' `VideoProcessor` makes: a float tensor [F, 3, height, width] or array
    [F, height, width, 3] in 0..1, a list of PIL images; and uint8 [F, height, width, 3], which is returned unchanged.

    Raises:
        ValueError: another type or shape, or pictures that are not finite.
    """
    video = videos[0]
    if isinstance(video, torch.Tensor):
        return _from_tensor(video)
    if isinstance(video, np.ndarray):
        return _from_tensor(torch.from_numpy(video))
    if isinstance(video, list | tuple) and video:
        frames = [torch.from_numpy(np.array(frame)) for frame in video]
        return _from_tensor(torch.stack(frames))
    raise ValueError(f"videos[0] is {type(video).__name__}: a tensor, an array or a list of images is needed.")


def _from_tensor(video: torch.Tensor) -> torch.Tensor:
    if video.ndim != 4:
        raise ValueError(f"videos[0] has shape {list(video.shape)}: four axes (frames first) are needed.")
    if video.dtype is torch.uint8:
        return video.cpu()
    channels_last = video.shape[-1] == 3
    if not channels_last:
        video = video.permute(0, 2, 3, 1)
    video = video.float()
    if not torch.isfinite(video).all():
        raise ValueError("videos[0] holds NaN or infinite values: the block cannot be shown.")
    return video.mul(255.0).round_().clamp_(0, 255).to(torch.uint8).cpu().contiguous()


def to_image_batch(frames: torch.Tensor) -> torch.Tensor:
    """uint8 [F, height, width, 3] to ComfyUI's IMAGE: float32 in 0..1, the same shape."""
    return frames.to(torch.float32).div_(255.0)
