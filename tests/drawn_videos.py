"""Videos with known pictures, written by PyAV: picture n has its own colour."""

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import cast

import av
import numpy as np
import torch

# Grey levels far enough apart to be told from each other after encoding.
STEP = 8
TONE = 440.0
SAMPLE_RATE = 44_100


def draw_pictures(count: int, width: int = 48, height: int = 32) -> np.ndarray:
    """uint8 [count, height, width, 3]: one grey level for each picture, and a light left half."""
    pictures = np.zeros((count, height, width, 3), dtype=np.uint8)
    pictures += (STEP * np.arange(count, dtype=np.uint8) + 10)[:, None, None, None]
    pictures[:, :, : width // 2] += 20
    return pictures


def numbers_of(pictures: torch.Tensor) -> list[int]:
    """Which of the drawn pictures each of uint8 [F, height, width, 3] is, by its right edge."""
    levels = pictures[:, :, -1].float().mean((1, 2))
    return [round(level) for level in ((levels - 10) / STEP).tolist()]


def write_video(
    path: Path,
    count: int = 12,
    *,
    rate: int = 12,
    codec: str = "libx264",
    pixels: str = "yuv420p",
    times: Sequence[int] | None = None,
    sound: bool = False,
) -> Path:
    """Write the drawn pictures, all at `rate` a second or each at its time in milliseconds; perhaps a tone to them."""
    with av.open(str(path), "w") as container:
        stream = cast(av.VideoStream, container.add_stream(codec, rate=rate))
        stream.width, stream.height, stream.pix_fmt = 48, 32, pixels
        stream.options = {"crf": "5"}
        if times is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        track = container.add_stream("aac", rate=SAMPLE_RATE, layout="mono") if sound else None
        for index, picture in enumerate(draw_pictures(count)):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            if times is not None:
                frame.pts, frame.time_base = times[index], Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
        if track is not None:
            samples = np.sin(2 * np.pi * TONE * np.arange(SAMPLE_RATE * count // rate) / SAMPLE_RATE)
            for begin in range(0, len(samples), 1024):
                part = np.ascontiguousarray(samples[None, begin : begin + 1024], dtype=np.float32) / 2
                sounding = av.AudioFrame.from_ndarray(part, format="fltp", layout="mono")
                sounding.sample_rate, sounding.pts = SAMPLE_RATE, begin
                sounding.time_base = Fraction(1, SAMPLE_RATE)
                container.mux(track.encode(sounding))
            container.mux(track.encode(None))
    return path
