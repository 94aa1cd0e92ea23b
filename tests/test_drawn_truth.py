"""The checker of the quality benchmark: reads drawn clips right, and wrong ones as wrong."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from streamblocks.benchmarks.drawn_truth import Seen, see
from streamblocks.tools.train_mini.clips import ClipPlan, draw_clips
from streamblocks.tools.train_mini.scenes import BACKGROUNDS, COLORS, DIRECTIONS, SHAPES, Scene


def draw_frames(scene: Scene, x: float, y: float, frames: int = 12) -> torch.Tensor:
    """A clip as the session gives it: uint8 [F, 64, 64, 3]."""
    clip = draw_clips([ClipPlan(scene, scene, 0, x, y)], frames)[0]
    return ((clip.permute(1, 2, 3, 0) + 1.0) * 127.5).round().to(torch.uint8)


def test_all_scenes_are_read_as_drawn_also_across_edges_and_blurred() -> None:
    generator = torch.Generator().manual_seed(0)
    blur = torch.ones(1, 1, 3, 3) / 9
    for scene in (Scene(*names) for names in product(COLORS, SHAPES, DIRECTIONS, BACKGROUNDS)):
        x, y = (64 * torch.rand(2, generator=generator)).tolist()
        frames = draw_frames(scene, x, y)
        wanted = Seen(scene.color, scene.shape, scene.direction)
        assert see(frames) == wanted
        noisy = torch.nn.functional.pad(frames.permute(0, 3, 1, 2).float(), (1, 1, 1, 1), mode="circular")
        noisy = torch.nn.functional.conv2d(noisy.flatten(0, 1)[:, None], blur)[:, 0].unflatten(0, (-1, 3))
        noisy = (noisy + 8 * torch.randn(noisy.shape, generator=generator)).clamp(0, 255)
        assert see(noisy.permute(0, 2, 3, 1).to(torch.uint8)) == wanted


def test_what_is_not_there_is_not_seen() -> None:
    frames = draw_frames(Scene("red", "square", "left"), 30.0, 30.0)
    assert see(frames[:1].expand(12, -1, -1, -1)) == Seen("red", "square", None)
    assert see(frames.flip(0)).direction == "right"
    assert see(torch.full((9, 64, 64, 3), 128, dtype=torch.uint8)) == Seen(None, None, None)
    noise = torch.randint(256, (9, 64, 64, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    assert see(noise).shape is None
    # A grey shape is none, wherever it moves.
    grey = frames.float().mean(-1, keepdim=True).expand_as(frames).to(torch.uint8)
    assert see(grey) == Seen(None, None, None)
    with pytest.raises(ValueError, match="frames are"):
        see(frames[:, :32])


def test_the_frames_of_most_decide() -> None:
    first, second = (draw_frames(Scene(color, "circle", "up"), 32.0, 32.0) for color in ("red", "blue"))
    assert see(torch.cat([first[:3], second[3:]])).color == "blue"
