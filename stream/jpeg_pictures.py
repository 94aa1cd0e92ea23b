"""JPEGs from strangers become pictures: looked at before anything is decoded."""

from __future__ import annotations

import io
import math

import numpy as np
import torch
from PIL.JpegImagePlugin import JpegImageFile

LEAST_SIDE, MOST_SIDE = 16, 4096
MOST_PIXELS = 16_000_000
# Larger ones are decoded at half or a quarter of their size, which is more than streams have: on the way a pixel takes
# 10 bytes, and 14 where there are four channels.
_MOST_DECODED, _MOST_DECODED_OF_FOUR = 4_000_000, 3_000_000
# A progressive JPEG decodes all of its picture again for each scan; encoders write about ten.
MOST_SCANS = 64
_SCAN = b"\xff\xda"
_NO_JPEG = (SyntaxError, OSError, ValueError, TypeError, KeyError, IndexError, EOFError, OverflowError)


def decode_jpeg(jpeg: bytes) -> torch.Tensor:
    """One picture, uint8 [height, width, 3]; grey and CMYK become RGB.

    One of more than four megapixels, or three of CMYK, comes at half its width and height, or a quarter.

    Raises:
        ValueError: one sentence: no JPEG, broken off, or too large; sizes are read from the header.
    """
    if jpeg.count(_SCAN) > MOST_SCANS:
        raise ValueError(f"The picture has more than {MOST_SCANS} scans: send an ordinary JPEG.")
    try:
        # Not Image.open: it warns of large pictures by itself, and tries other formats.
        picture = JpegImageFile(io.BytesIO(jpeg))
    except _NO_JPEG:
        raise ValueError("The picture is no JPEG that can be read: send one picture as JPEG.") from None
    with picture:
        _check_size(*picture.size)
        most = _MOST_DECODED_OF_FOUR if picture.layers == 4 else _MOST_DECODED
        if math.prod(picture.size) > most:
            _check_is_one_scan(jpeg, picture)
            part = 2 if math.prod(picture.size) <= 4 * most else 4
            picture.draft(None, (picture.width // part, picture.height // part))
        try:
            # A copy of one that is RGB already would take as much again.
            picture.load()
            pixels = np.array(picture if picture.mode == "RGB" else picture.convert("RGB"))
        except _NO_JPEG:
            raise ValueError("The picture is broken off or damaged: send all of its JPEG.") from None
    return torch.from_numpy(pixels)


def _check_size(width: int, height: int) -> None:
    sides_fit = min(width, height) >= LEAST_SIDE and max(width, height) <= MOST_SIDE
    if not sides_fit or width * height > MOST_PIXELS:
        raise ValueError(
            f"The picture is {width}x{height}: send {LEAST_SIDE} to {MOST_SIDE} pixels a side, and at most "
            f"{MOST_PIXELS // 1_000_000} megapixels."
        )


def _check_is_one_scan(jpeg: bytes, picture: JpegImageFile) -> None:
    """Raise ValueError for a large picture in several scans, whose coefficients are all held at once."""
    scan = jpeg.find(_SCAN)
    # Behind the marker: two bytes of length, then how many of the channels the scan has.
    if jpeg.count(_SCAN) > 1 or "progressive" in picture.info or jpeg[scan + 4 : scan + 5] != bytes((picture.layers,)):
        raise ValueError(
            f"The picture is {picture.width}x{picture.height} in several scans: send a baseline JPEG without a "
            f"thumbnail, or at most {_MOST_DECODED_OF_FOUR // 1_000_000} megapixels."
        )
