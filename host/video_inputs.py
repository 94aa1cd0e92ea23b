"""What is inside a VIDEO of ComfyUI."""

from __future__ import annotations

import io
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
from comfy_api.latest import InputImpl


@dataclass(frozen=True)
class GivenVideo:
    """A VIDEO: a file, or pictures in memory.

    Attributes:
        file: a path, or the content of a file in memory; None for pictures.
        begin: seconds of the file that are left out at its start.
        duration: seconds that are used from there; 0 for all.
        images: float [F, height, width, channels] in 0..1; None for a file.
        rate: pictures a second of `images`.
        audio: ComfyUI's AUDIO that belongs to `images`; None where there is none.
    """

    file: str | io.BytesIO | None = None
    begin: float = 0.0
    duration: float = 0.0
    images: torch.Tensor | None = None
    rate: Fraction = Fraction(1)
    audio: dict[str, Any] | None = None


def look_into_video(video: Any) -> GivenVideo:  # noqa: ANN401
    """A VIDEO's content, without decoding a file."""
    # Asked for its file, a video of pictures would encode them.
    of_pictures = getattr(InputImpl, "VideoFromComponents", None)
    if of_pictures is not None and isinstance(video, of_pictures):
        parts = video.get_components()
        return GivenVideo(images=parts.images, rate=_rate_of(parts.frame_rate), audio=parts.audio)
    window = getattr(video, "get_active_trim_window", lambda: (0.0, 0.0))()
    return GivenVideo(video.get_stream_source(), float(window[0]), float(window[1]))


def _rate_of(value: Any) -> Fraction:  # noqa: ANN401
    try:
        return Fraction(value)
    except (ValueError, OverflowError, TypeError, ZeroDivisionError) as error:
        raise ValueError(f"video has {value!r} pictures a second: give one with a rate above 0.") from error
