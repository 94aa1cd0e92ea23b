"""Pictures as pipelines return them, converted to one format."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

# Beyond 0..1 by this much is another range; by less it is overshoot, and clamped.
_OVERSHOOT = 0.25
# Of PIL's modes, those of 8 bits.
_MODES = frozenset({"1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV", "LAB"})
_TAKEN = (
    "pictures [frames, 3, height, width] or [frames, height, width, 3] as floats in 0..1 or as uint8, or a list of PIL "
    "images, are taken"
)
# Where the channels may be, in the order in which a shape is looked at: three channels are told from grey and alpha
# first, and frames come before channels where both are possible.
_PLACES = ((3, -1), (3, 1), (1, -1), (4, -1), (1, 1), (4, 1), (3, 0), (1, 0), (4, 0))


def to_uint8_frames(videos: Any) -> torch.Tensor:  # noqa: ANN401
    """The first video of a pipeline's `videos` as uint8 [F, height, width, 3] on the CPU.

    Takes what diffusers' `VideoProcessor` makes, tensors, arrays and lists of PIL images, with the channels first,
    second or last. Grey becomes RGB, alpha is left out. uint8 [F, height, width, 3] is returned unchanged.

    Raises:
        ValueError: no pictures, another type, shape or range, or pictures that are not finite.
    """
    video = _first_of(videos)
    if isinstance(video, np.ndarray):
        return _from_array(video)
    if isinstance(video, torch.Tensor):
        return _from_tensor(video)
    if isinstance(video, list | tuple):
        return _from_list(video)
    raise ValueError(f"videos[0] is {type(video).__name__}: {_TAKEN}.")


def _first_of(videos: Any) -> Any:  # noqa: ANN401
    if not isinstance(videos, torch.Tensor | np.ndarray | list | tuple):
        raise ValueError(f"videos is {type(videos).__name__}: {_TAKEN}, in a list of one video.")
    if len(videos) == 0 or videos[0] is None:
        raise ValueError(f"videos holds no video: {_TAKEN}.")
    # A video that is not in a batch.
    return videos if isinstance(videos, torch.Tensor | np.ndarray) and videos.ndim == 4 else videos[0]


def _from_list(pictures: Sequence[Any]) -> torch.Tensor:
    if not pictures:
        raise ValueError(f"videos[0] holds no pictures: {_TAKEN}.")
    kinds = sorted({type(picture).__name__ for picture in pictures})
    if all(isinstance(picture, Image.Image) for picture in pictures):
        modes = {picture.mode for picture in pictures} - _MODES
        if modes:
            raise ValueError(f"videos[0] has PIL images of mode {', '.join(sorted(modes))}: those of 8 bits are taken.")
        # Grey, palettes and alpha are what PIL knows.
        pictures = [torch.from_numpy(np.array(picture.convert("RGB"))) for picture in pictures]
    elif all(isinstance(picture, np.ndarray) for picture in pictures):
        pictures = [_tensor_of(picture) for picture in pictures]
    elif not all(isinstance(picture, torch.Tensor) for picture in pictures):
        raise ValueError(f"videos[0] is a list of {', '.join(kinds)}: {_TAKEN}.")
    shapes = {tuple(picture.shape) for picture in pictures}
    if len(shapes) > 1:
        raise ValueError(f"videos[0] has pictures of shapes {sorted(shapes)}: all of a video must have one.")
    return _from_tensor(torch.stack(list(pictures)))


def _from_array(video: np.ndarray) -> torch.Tensor:
    return _from_tensor(_tensor_of(video))


def _tensor_of(array: np.ndarray) -> torch.Tensor:
    if array.dtype != np.uint8 and array.dtype.kind != "f":
        raise ValueError(f"videos[0] is an array of {array.dtype}: {_TAKEN}.")
    # torch takes neither negative strides nor other byte orders nor long doubles.
    kind = np.uint8 if array.dtype == np.uint8 else np.float32
    return torch.from_numpy(np.ascontiguousarray(array, dtype=kind))


def _from_tensor(video: torch.Tensor) -> torch.Tensor:
    if video.ndim != 4:
        raise ValueError(f"videos[0] has shape {list(video.shape)}: four axes (frames first) are needed; {_TAKEN}.")
    if 0 in video.shape:
        raise ValueError(f"videos[0] has shape {list(video.shape)}, which is no picture: {_TAKEN}.")
    pictures = _to_rgb(video)
    if pictures.dtype is torch.uint8:
        return pictures.cpu().contiguous()
    if not pictures.is_floating_point():
        raise ValueError(f"videos[0] is of {video.dtype}: {_TAKEN}.")
    pictures = pictures.float()
    if not torch.isfinite(pictures).all():
        raise ValueError("videos[0] holds NaN or infinite values: the block cannot be shown.")
    low, high = (float(edge) for edge in pictures.aminmax())
    if low < -_OVERSHOOT or high > 1 + _OVERSHOOT:
        raise ValueError(f"videos[0] has values from {low:.4g} to {high:.4g}: {_TAKEN}.")
    return pictures.mul(255.0).round_().clamp_(0, 255).to(torch.uint8).cpu().contiguous()


def _to_rgb(video: torch.Tensor) -> torch.Tensor:
    """[F, height, width, 3] of four axes in another order, or of another number of channels."""
    for channels, axis in _PLACES:
        if video.shape[axis] != channels:
            continue
        last = video if axis == -1 else video.permute((0, 2, 3, 1) if axis == 1 else (1, 2, 3, 0))
        return last.expand(*last.shape[:3], 3) if channels == 1 else last[..., :3]
    raise ValueError(f"videos[0] has shape {list(video.shape)}, without 1, 3 or 4 channels: {_TAKEN}.")


def to_image_batch(frames: torch.Tensor) -> torch.Tensor:
    """uint8 [F, height, width, 3] to ComfyUI's IMAGE: float32 in 0..1, the same shape."""
    return frames.to(torch.float32).div_(255.0)
