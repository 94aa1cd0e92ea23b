"""What a clip shows, and the small English in which it is said."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import product

import torch

COLORS: dict[str, tuple[float, float, float]] = {
    "red": (0.92, 0.10, 0.10),
    "green": (0.10, 0.72, 0.16),
    "blue": (0.14, 0.24, 0.94),
    "yellow": (0.96, 0.86, 0.10),
}
SHAPES = ("circle", "square", "triangle")
# Steps in x (right) and y (down).
DIRECTIONS: dict[str, tuple[int, int]] = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
# Grey levels: a shape is then the only saturated thing in the picture.
BACKGROUNDS: dict[str, float] = {"black": 0.04, "grey": 0.50, "white": 0.96}
DEFAULT_BACKGROUND = "black"

# Ways to say it; the first of each is the plain one.
_ARTICLES = ("a", "the", "")
_VERBS = ("moves", "is moving", "goes", "moving")
_TOWARDS = ("{}", "to the {}", "{}wards")
_BEHIND = ("on a {} background", "on {}", "on the {} background", "in front of a {} background")
# Share of captions that are the plain one.
_PLAIN_SHARE = 0.5


@dataclass(frozen=True)
class Scene:
    """One moving shape: keys of `COLORS`, `DIRECTIONS` and `BACKGROUNDS`, an entry of `SHAPES`."""

    color: str
    shape: str
    direction: str
    background: str = DEFAULT_BACKGROUND


def all_scenes() -> list[Scene]:
    """Every caption of the grammar: colour, shape, direction, background."""
    return [Scene(*parts) for parts in product(COLORS, SHAPES, DIRECTIONS, BACKGROUNDS)]


def another_of(names: Iterable[str], known: str, number: int) -> str:
    """One of `names` other than `known`, each in its turn for numbers 0, 1, ..."""
    listed = list(names)
    return listed[(listed.index(known) + 1 + number % (len(listed) - 1)) % len(listed)]


def plain_caption(scene: Scene) -> str:
    """The plain way to say it; the default background goes unsaid."""
    return _say(scene, (0, 0, 0, 0), name_background=scene.background != DEFAULT_BACKGROUND)


def draw_scene(generator: torch.Generator) -> Scene:
    """A scene, all kinds equally often."""
    return Scene(
        _pick(tuple(COLORS), generator),
        _pick(SHAPES, generator),
        _pick(tuple(DIRECTIONS), generator),
        _pick(tuple(BACKGROUNDS), generator),
    )


def change_scene(scene: Scene, generator: torch.Generator) -> Scene:
    """Another scene: at least one of colour, shape, direction and background differs."""
    changed = scene
    while changed == scene:
        other = draw_scene(generator)
        # The background is what a change of prompt seldom names.
        shares = {"color": 0.5, "shape": 0.5, "direction": 0.5, "background": 0.15}
        taken = {name: getattr(other, name) for name, share in shares.items() if _chance(share, generator)}
        changed = replace(scene, **taken)
    return changed


def draw_caption(scene: Scene, generator: torch.Generator) -> str:
    """One of the many ways to say it."""
    named = scene.background != DEFAULT_BACKGROUND
    if _chance(_PLAIN_SHARE, generator):
        return _say(scene, (0, 0, 0, 0), name_background=named)
    ways = (_ARTICLES, _VERBS, _TOWARDS, _BEHIND)
    choice = tuple(int(torch.randint(len(way), (), generator=generator)) for way in ways)
    return _say(scene, choice, name_background=named or _chance(0.5, generator))


def all_words() -> list[str]:
    """Every word a caption can hold, sorted."""
    texts = [*COLORS, *SHAPES, *BACKGROUNDS, *_ARTICLES, *_VERBS]
    texts += [way.format(name) for way in _TOWARDS for name in DIRECTIONS]
    texts += [way.format("grey") for way in _BEHIND] + ["gray"]
    return sorted({word for text in texts for word in text.split()})


def _say(scene: Scene, ways: Sequence[int], *, name_background: bool) -> str:
    article, verb, towards, behind = ways
    words = [_ARTICLES[article], scene.color, scene.shape, _VERBS[verb], _TOWARDS[towards].format(scene.direction)]
    if name_background:
        words.append(_BEHIND[behind].format(scene.background))
    return " ".join(word for word in words if word)


def _pick(names: Sequence[str], generator: torch.Generator) -> str:
    return names[int(torch.randint(len(names), (), generator=generator))]


def _chance(share: float, generator: torch.Generator) -> bool:
    return bool(torch.rand((), generator=generator) < share)
