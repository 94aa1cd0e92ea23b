"""Which colour, shape and direction frames show: measured from the pixels, by comparing with drawings."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from streamblocks.tools.train_mini.clips import SIZE, SPEED, cover_pixels
from streamblocks.tools.train_mini.scenes import COLORS, DIRECTIONS, SHAPES, Scene

# Backgrounds are grey, shapes are not: a pixel with a smaller spread of its channels (0..1) belongs to no shape.
_LEAST_SPREAD = 0.15
# A shape smaller than a third of the smallest one drawn, or less like each drawing than this, is none.
_LEAST_AREA = 100.0
_LEAST_OVERLAP = 0.6
# Largest distance in RGB (0..1) at which a colour still counts as one of those named.
_LARGEST_COLOR_DISTANCE = 0.35
_LEAST_SPEED = SPEED / 4


@dataclass(frozen=True)
class Seen:
    """What a run of frames shows; None where it is nothing that captions can name."""

    color: str | None
    shape: str | None
    direction: str | None


@dataclass(frozen=True)
class Hits:
    """Which parts of a caption are visible."""

    color: bool
    shape: bool
    direction: bool

    @property
    def all(self) -> bool:
        """Whether the frames show what the caption says."""
        return self.color and self.shape and self.direction


def compare(frames: torch.Tensor, scene: Scene) -> Hits:
    """Compare frames, uint8 [F, 64, 64, 3], with the scene that was asked for."""
    seen = see(frames)
    return Hits(seen.color == scene.color, seen.shape == scene.shape, seen.direction == scene.direction)


def see(frames: torch.Tensor) -> Seen:
    """Read frames, uint8 [F, 64, 64, 3], F of 2 or more: the colour and shape of most, the median step as direction.

    Raises:
        ValueError: the frames have another size, or there are fewer than 2.
    """
    if frames.dim() != 4 or tuple(frames.shape[1:]) != (SIZE, SIZE, 3) or len(frames) < 2:
        raise ValueError(f"frames are {tuple(frames.shape)}: give [2 or more, {SIZE}, {SIZE}, 3].")
    pictures = frames.float() / 255.0
    spread = pictures.amax(-1) - pictures.amin(-1)
    colors = [_color_of(picture, mask) for picture, mask in zip(pictures, spread, strict=True)]
    cover = _cover(spread)
    centres = _centres(cover)
    present = cover.sum((1, 2)) >= _LEAST_AREA
    shapes = [
        _shape_of(one, centre) if here else None for one, centre, here in zip(cover, centres, present, strict=True)
    ]
    colors = [color if here else None for color, here in zip(colors, present, strict=True)]
    return Seen(_most(colors), _most(shapes), _direction_of(centres[present]))


def places(frames: torch.Tensor) -> torch.Tensor:
    """Where the shape is in each of frames, uint8 [F, 64, 64, 3]: its centre (x, y) in pixels, [F, 2]."""
    pictures = frames.float() / 255.0
    return _centres(_cover(pictures.amax(-1) - pictures.amin(-1)))


def _cover(spread: torch.Tensor) -> torch.Tensor:
    """How much of each pixel [F, 64, 64] belongs to a shape, 0..1, by how colourful it is."""
    cover = (spread / spread.flatten(1).quantile(0.97, dim=1).clamp(min=_LEAST_SPREAD)[:, None, None]).clamp(0.0, 1.0)
    return cover * (spread >= _LEAST_SPREAD)


def _color_of(picture: torch.Tensor, spread: torch.Tensor) -> str | None:
    """Nearest named colour of the most colourful pixels of one picture [64, 64, 3]."""
    inside = spread >= torch.maximum(0.7 * spread.flatten().quantile(0.97), torch.tensor(_LEAST_SPREAD))
    if not inside.any():
        return None
    mean = picture[inside].mean(0)
    distances = {name: float((mean - torch.tensor(rgb)).norm()) for name, rgb in COLORS.items()}
    nearest = min(distances, key=distances.__getitem__)
    return nearest if distances[nearest] <= _LARGEST_COLOR_DISTANCE else None


def _centres(cover: torch.Tensor) -> torch.Tensor:
    """Centres of mass (x, y) [F, 2] of [F, 64, 64] on a world that wraps around."""
    turn = 2.0 * math.pi / SIZE
    angles = turn * (torch.arange(SIZE, dtype=torch.float32) + 0.5)
    rough = torch.stack(
        [
            torch.atan2((line * angles.sin()).sum(-1), (line * angles.cos()).sum(-1)) / turn
            for line in (cover.sum(1), cover.sum(2))
        ],
        dim=-1,
    )
    # For a lopsided shape the mean of angles is not the centre of mass, so that is measured around it.
    places = torch.arange(SIZE, dtype=torch.float32) + 0.5
    away = (places - rough[..., None] + SIZE / 2).remainder(SIZE) - SIZE / 2
    mass = torch.stack([cover.sum(1), cover.sum(2)], dim=1)
    return (rough + (away * mass).sum(-1) / mass.sum(-1).clamp(min=1e-6)).remainder(SIZE)


def _shape_of(cover: torch.Tensor, centre: torch.Tensor) -> str | None:
    """The drawing that overlaps most, by intersection over union, with the cover [64, 64] of one picture."""
    drawn = cover_pixels(centre.expand(1, len(SHAPES), 2), torch.arange(len(SHAPES))[None])[0]
    shared = torch.minimum(drawn, cover).sum((1, 2)) / torch.maximum(drawn, cover).sum((1, 2))
    best = int(shared.argmax())
    return SHAPES[best] if float(shared[best]) >= _LEAST_OVERLAP else None


def _direction_of(centres: torch.Tensor) -> str | None:
    if len(centres) < 2:
        return None
    steps = (centres.diff(dim=0) + SIZE / 2).remainder(SIZE) - SIZE / 2
    along = {
        name: float((steps @ torch.tensor(step, dtype=torch.float32)).median()) for name, step in DIRECTIONS.items()
    }
    fastest = max(along, key=along.__getitem__)
    return fastest if along[fastest] >= _LEAST_SPEED else None


def _most(names: Sequence[str | None]) -> str | None:
    return Counter(names).most_common(1)[0][0]
