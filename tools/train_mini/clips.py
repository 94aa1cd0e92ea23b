"""Clips drawn on the fly: one shape that moves at a constant speed and wraps around the edges."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .scenes import BACKGROUNDS, COLORS, DIRECTIONS, SHAPES, Scene, change_scene, draw_scene

SIZE = 64
# Pixels a shape moves from one picture to the next: one latent cell per latent frame.
SPEED = 2
_TILE = 8
# Half extents in pixels: radius, half side, distance from the centre to a corner.
CIRCLE, SQUARE, TRIANGLE = 11.0, 10.0, 15.0


@dataclass(frozen=True)
class ClipPlan:
    """What is drawn.

    Attributes:
        before: the scene of the first pictures.
        after: the scene from picture `cut` on; the shape goes on from where it was.
        cut: index of a picture; 0 where nothing changes (`after` is then all there is).
        x: column of the centre in the first picture, 0..64.
        y: row of the centre.
    """

    before: Scene
    after: Scene
    cut: int
    x: float
    y: float


def draw_plan(generator: torch.Generator, *, cuts: Sequence[int], change_share: float) -> ClipPlan:
    """A random plan, which in `change_share` of cases has a change at one of `cuts`."""
    scene = draw_scene(generator)
    x, y = (torch.rand(2, generator=generator) * SIZE).tolist()
    if float(torch.rand((), generator=generator)) >= change_share:
        return ClipPlan(scene, scene, 0, x, y)
    cut = cuts[int(torch.randint(len(cuts), (), generator=generator))]
    return ClipPlan(scene, change_scene(scene, generator), cut, x, y)


def draw_clips(plans: Sequence[ClipPlan], frames: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """Draw clips.

    Args:
        plans: one per clip.
        frames: pictures per clip.
        device: to draw on.

    Returns:
        Float32 [clips, 3, frames, 64, 64] in -1..1, edges antialiased.
    """
    scenes = [[plan.after if frame >= plan.cut else plan.before for frame in range(frames)] for plan in plans]
    steps = torch.tensor([[DIRECTIONS[scene.direction] for scene in row] for row in scenes], dtype=torch.float32)
    start = torch.tensor([[(plan.x, plan.y)] for plan in plans], dtype=torch.float32)
    # The first picture shows the start: its own step does not count.
    moved = SPEED * (steps.cumsum(1) - steps[:, :1])
    centres = (start + moved).to(device)
    kinds = torch.tensor([[SHAPES.index(scene.shape) for scene in row] for row in scenes], device=device)
    colors = torch.tensor([[COLORS[scene.color] for scene in row] for row in scenes], device=device)
    grounds = torch.tensor([[BACKGROUNDS[scene.background] for scene in row] for row in scenes], device=device)
    cover = cover_pixels(centres, kinds)[:, :, None]
    ground = grounds[:, :, None, None, None]
    pictures = ground + cover * (colors[:, :, :, None, None] - ground)
    return (pictures * 2.0 - 1.0).transpose(1, 2).contiguous()


def cover_pixels(centres: torch.Tensor, kinds: torch.Tensor) -> torch.Tensor:
    """How much of each pixel a shape covers, [clips, frames, 64, 64] in 0..1; `kinds` are indices into `SHAPES`."""
    places = torch.arange(SIZE, dtype=torch.float32, device=centres.device) + 0.5
    half = SIZE / 2
    across = (places - centres[..., :1] + half).remainder(SIZE)[:, :, None, :] - half
    down = (places - centres[..., 1:] + half).remainder(SIZE)[:, :, :, None] - half
    # Distances to the edge, negative inside.
    circle = (across.square() + down.square()).sqrt() - CIRCLE
    square = torch.maximum(across.abs(), down.abs()) - SQUARE
    slope = 0.75**0.5 * across.abs() - 0.5 * (down + TRIANGLE)
    triangle = torch.maximum(slope, down - TRIANGLE / 2)
    distance = torch.stack((circle, square, triangle)).gather(0, kinds[None, :, :, None, None].expand_as(circle[None]))
    return (0.5 - distance[0]).clamp(0.0, 1.0)


def draw_tiles(count: int, size: int, generator: torch.Generator) -> torch.Tensor:
    """Single pictures of flat tiles, each of one of the colours and backgrounds.

    Returns:
        Float32 [count, 3, 1, size, size] in -1..1; tiles of 8 pixels, the place of one latent cell.
    """
    palette = torch.tensor([*COLORS.values(), *([grey] * 3 for grey in BACKGROUNDS.values())])
    chosen = torch.randint(len(palette), (count, size // _TILE, size // _TILE), generator=generator)
    tiles = palette[chosen].permute(0, 3, 1, 2) * 2.0 - 1.0
    return tiles.repeat_interleave(_TILE, 2).repeat_interleave(_TILE, 3).unsqueeze(2)
