"""Contact sheets of streams: one row each, its prompt above, pictures evenly spread from left to right."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import streamblocks_path  # noqa: F401
import torch
from PIL import Image, ImageDraw
from quality_streams import StreamOutcome

from streamblocks.tools.contact_sheet import evenly_spread
from streamblocks.tools.train_mini.scenes import plain_caption

_PICTURES, _GAP, _LABEL = 16, 4, 16
_BACKGROUND, _INK = (24, 24, 24), (235, 235, 235)


def write_sheet(outcomes: Sequence[StreamOutcome], target: Path) -> None:
    """Write the sheet of streams whose frames were kept; PNG."""
    strips = [(_label(outcome), _strip(outcome.frames)) for outcome in outcomes]
    width = max(strip.width for _, strip in strips)
    height = sum(strip.height + _LABEL + _GAP for _, strip in strips)
    sheet = Image.new("RGB", (width, height), _BACKGROUND)
    draw, top = ImageDraw.Draw(sheet), 0
    for label, strip in strips:
        draw.text((_GAP, top + 2), label, _INK)
        sheet.paste(strip, (0, top + _LABEL))
        top += strip.height + _LABEL + _GAP
    target.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(target)


def _label(outcome: StreamOutcome) -> str:
    job = outcome.job
    said = list(dict.fromkeys(plain_caption(scene) for scene in job.scenes))
    return f"{', then '.join(said)}   ({len(job.scenes)} blocks, {job.policy}, {job.weights}, seed {job.seed})"


def _strip(frames: torch.Tensor) -> Image.Image:
    places = evenly_spread(len(frames), _PICTURES)
    _, height, _, channels = frames.shape
    gap = np.full((height, _GAP, channels), _BACKGROUND[0], dtype=np.uint8)
    pieces = [piece for place in places for piece in (frames[place].numpy(), gap)]
    return Image.fromarray(np.concatenate(pieces, axis=1))
