"""Thumbnails of example workflows: pictures of the videos that they make."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import av
from PIL import Image

from streamblocks.tools.contact_sheet import evenly_spread

COLUMNS, ROWS = 4, 3
GAP = 4
# Lighter than the mini model's black.
BACKGROUND = (96, 96, 96)


def write_thumbnail(files: Sequence[Path], target: Path, width: int) -> None:
    """Write a JPEG of what a workflow has saved: the videos in this order, then the plots.

    One video alone fills three rows; of several, or beside a plot, each has one row, at the same moments.

    Args:
        files: mp4 videos and PNG pictures.
        target: the JPEG.
        width: of the thumbnail, in pixels.
    """
    rows = ROWS if len(files) == 1 else 1
    strips: list[Image.Image] = []
    for file in sorted(files, key=lambda file: file.suffix == ".png"):
        if file.suffix == ".png":
            strips.append(_wide(Image.open(file).convert("RGB"), width))
        else:
            strips += _strips(_pictures(file, COLUMNS * rows), width)
    height = sum(strip.height + GAP for strip in strips) - GAP
    sheet = Image.new("RGB", (width, height), BACKGROUND)
    top = 0
    for strip in strips:
        sheet.paste(strip, (0, top))
        top += strip.height + GAP
    sheet.save(target, quality=85)


def _pictures(video: Path, count: int) -> list[Image.Image]:
    with av.open(str(video)) as container:
        pictures = [frame.to_image() for frame in container.decode(video=0)]
    return [pictures[number] for number in evenly_spread(len(pictures), count)]


def _strips(pictures: list[Image.Image], width: int) -> list[Image.Image]:
    """Rows of pictures, as wide as the thumbnail."""
    cell = (width - GAP * (COLUMNS - 1)) // COLUMNS
    strips = []
    for begin in range(0, len(pictures), COLUMNS):
        row = [_wide(picture, cell) for picture in pictures[begin : begin + COLUMNS]]
        strip = Image.new("RGB", (width, row[0].height), BACKGROUND)
        for place, picture in enumerate(row):
            strip.paste(picture, (place * (cell + GAP), 0))
        strips.append(strip)
    return strips


def _wide(picture: Image.Image, width: int) -> Image.Image:
    return picture.resize((width, round(picture.height * width / picture.width)), Image.Resampling.LANCZOS)
