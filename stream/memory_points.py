"""The points of a stream's memory chart, bounded however long the stream runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

# As many as the chart of the page keeps before it drops every second one.
MOST_COLUMNS = 256


@dataclass(frozen=True)
class PointsSince:
    """What a page has not seen.

    Attributes:
        begin: the page's own cursor, or 0: these are all points, and the page forgets those it has.
        points: as the chart makes them, oldest first.
        cursor: where the page asks next.
    """

    begin: int
    points: tuple[Mapping[str, Any], ...]
    cursor: int


class MemoryPoints:
    """A column for each block that has ended, thinned as the page thins them, and the newest point.

    Every point gets a number; a cursor is the number that comes next. Points of a block being made stand for those
    of the same block before them. Not thread-safe.
    """

    def __init__(self) -> None:
        self._columns: list[tuple[int, Mapping[str, Any]]] = []
        self._newest: tuple[int, Mapping[str, Any]] | None = None
        self._stride = 1
        self._next = 0
        # A cursor below has not seen what was dropped meanwhile.
        self._whole_from = 0

    def add(self, point: Mapping[str, Any]) -> None:
        """Take a point; one that says `first` begins a new chart."""
        if point.get("first"):
            self._columns, self._newest, self._stride, self._whole_from = [], None, 1, self._next
        # The page begins anew by the cursor, so that a point may be sent again.
        self._newest = (self._next, self._with_earlier(point) | {"first": False})
        self._next += 1
        if point.get("owners") and (point.get("block") or 0) % self._stride == 0:
            self._columns.append(self._newest)
            self._thin()

    def _with_earlier(self, point: Mapping[str, Any]) -> dict[str, Any]:
        """The point with peak and event of the newest one, if that is of the same block."""
        newest = {} if self._newest is None else self._newest[1]
        if newest.get("block") != point.get("block") or newest.get("owners"):
            return dict(point)
        peak = max(point.get("peak", 0), newest.get("peak", 0))
        return {**point, "peak": peak, "event": point.get("event") or newest.get("event", "")}

    def _thin(self) -> None:
        while len(self._columns) > MOST_COLUMNS:
            self._stride *= 2
            dropped = [number for number, point in self._columns if (point.get("block") or 0) % self._stride]
            self._columns = [column for column in self._columns if (column[1].get("block") or 0) % self._stride == 0]
            self._whole_from = max([self._whole_from, *(number + 1 for number in dropped)])

    def since(self, cursor: int) -> PointsSince:
        """The points from `cursor` on; all of them where some were dropped that it has not seen."""
        begin = cursor if self._whole_from <= cursor <= self._next else 0
        held = [*self._columns]
        if self._newest is not None and held[-1:] != [self._newest]:
            held.append(self._newest)
        return PointsSince(begin, tuple(point for number, point in held if number >= begin), self._next)
