"""A contact sheet of a video: numbered frames, evenly spread, on one picture.

python tools/contact_sheet.py output/stream.mp4 output/stream.png
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import av
from PIL import Image, ImageDraw

CELL_WIDTH = 320
COLUMNS = 4
GAP = 8
LABEL_HEIGHT = 18
BACKGROUND = (24, 24, 24)
INK = (235, 235, 235)


def write_contact_sheet(video: Path, target: Path, count: int = 12) -> int:
    """Write `count` frames of `video`, first and last among them, to `target`; return how many it shows."""
    numbers = evenly_spread(_count_frames(video), count)
    sheet = _compose(_frames(video, numbers))
    target.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(target)
    return len(numbers)


def evenly_spread(total: int, count: int) -> list[int]:
    """At most `count` different frame numbers of 0..`total`-1, both ends included."""
    if total < 1:
        raise ValueError("a video without frames has no contact sheet")
    if count < 2 or total == 1:
        return [0]
    return sorted({round(place * (total - 1) / (count - 1)) for place in range(count)})


def _count_frames(video: Path) -> int:
    # Decoded, not read from the header: a header may be missing or wrong.
    with av.open(str(video)) as container:
        return sum(1 for _ in container.decode(video=0))


def _frames(video: Path, numbers: list[int]) -> list[tuple[int, Image.Image]]:
    wanted = set(numbers)
    with av.open(str(video)) as container:
        decoded = enumerate(container.decode(video=0))
        return [(number, frame.to_image()) for number, frame in decoded if number in wanted]


def _compose(frames: list[tuple[int, Image.Image]]) -> Image.Image:
    width, height = frames[0][1].size
    cell = (CELL_WIDTH, max(1, round(CELL_WIDTH * height / width)))
    columns = min(COLUMNS, len(frames))
    rows = math.ceil(len(frames) / columns)
    step = (cell[0] + GAP, cell[1] + LABEL_HEIGHT + GAP)
    sheet = Image.new("RGB", (columns * step[0] + GAP, rows * step[1] + GAP), BACKGROUND)
    draw = ImageDraw.Draw(sheet)
    for place, (number, frame) in enumerate(frames):
        left, top = GAP + place % columns * step[0], GAP + place // columns * step[1]
        draw.text((left, top), f"frame {number}", fill=INK)
        sheet.paste(frame.resize(cell, Image.Resampling.LANCZOS), (left, top + LABEL_HEIGHT))
    return sheet


def main() -> None:
    """Run as a script."""
    parser = argparse.ArgumentParser(description="Write a contact sheet of a video.")
    parser.add_argument("video", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("--count", type=int, default=12, help="how many frames (default 12)")
    options = parser.parse_args()
    shown = write_contact_sheet(options.video, options.target, options.count)
    print(f"{options.target}: {shown} frames")


if __name__ == "__main__":
    main()
