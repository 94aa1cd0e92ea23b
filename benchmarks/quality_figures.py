"""Figures over the streams of `quality.py`, and how they are printed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from drawn_truth import Hits
from quality_streams import StreamOutcome

ASPECTS = ("color", "shape", "direction")


def spread(items: Sequence[Any], count: int) -> list[Any]:
    """`count` of the items in a fixed random order, which spreads them over every kind; all where there are fewer."""
    order = torch.randperm(len(items), generator=torch.Generator().manual_seed(0)).tolist()
    return [items[place] for place in sorted(order[:count])]


def share(hits: Sequence[Hits], aspect: str) -> float:
    """How many of the clips are right in an aspect, 0..1."""
    return mean([float(getattr(hit, aspect)) for hit in hits])


def by_aspect(hits: Sequence[Hits]) -> dict[str, float]:
    """`share` of each aspect."""
    return {aspect: share(hits, aspect) for aspect in ASPECTS}


def percent(hits: Sequence[Hits]) -> list[str]:
    """The shares of each aspect and of all three, for a table."""
    return [f"{100 * share(hits, aspect):.1f}" for aspect in (*ASPECTS, "all")]


def squared_errors(reference: Sequence[StreamOutcome], outcomes: Sequence[StreamOutcome]) -> list[float]:
    """The mean squared error of each clip's pictures, 0..255 squared."""
    return [
        float((one.frames.float() - other.frames.float()).square().mean())
        for one, other in zip(reference, outcomes, strict=True)
    ]


def mean(values: Sequence[float]) -> float:
    """Arithmetic mean."""
    return sum(values) / len(values)


def print_row(*cells: object) -> None:
    """One row of a table."""
    print("  " + "".join(f"{cell!s:>13}" for cell in cells), flush=True)
