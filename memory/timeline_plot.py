"""The timeline as a picture: owners stacked over the blocks, the peak as a line, events marked.

Drawn with Pillow, which ComfyUI and diffusers need anyway; a plotting library would be one more thing to install.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

from .byte_text import format_bytes, unit_for
from .timeline import BLOCK_END, Timeline

# Drawn larger and scaled down, for smooth edges.
_OVERSAMPLING = 2
# Owners with a colour of their own; the smaller ones are one area.
_NAMED_OWNERS = 6
_SMALLER = "smaller ones"
# The card's size is drawn as a line where the peak fills this share of it; otherwise it would flatten the areas.
_CARD_LINE_FROM = 0.3
_EVENT_LABELS = 4

_BACKGROUND, _INK, _GRID, _PEAK, _CARD = "#ffffff", "#1b1f24", "#d5d9de", "#111111", "#c62828"
# Okabe and Ito's palette, which people with colour blindness can tell apart, and grey for the rest.
_COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00")
_GREY, _GREY_INK = "#9aa0a6", "#5f6368"

Box = tuple[float, float, float, float]
Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


@dataclass(frozen=True)
class PlotSeries:
    """What is drawn.

    Attributes:
        blocks: index of each column.
        width: blocks that a column stands for.
        owners: by label, bytes per column; the first is drawn lowest.
        peaks: bytes per column.
        events: block and text.
        card: bytes of the card, or None.
    """

    blocks: tuple[int, ...]
    width: int
    owners: dict[str, tuple[int, ...]]
    peaks: tuple[int, ...]
    events: tuple[tuple[int, str], ...]
    card: int | None

    @property
    def top(self) -> int:
        """Most bytes that are drawn."""
        stacked = (sum(column) for column in zip(*self.owners.values(), strict=True)) if self.owners else ()
        top = max((*self.peaks, *stacked), default=1)
        return max(top, self.card or 0) if self.shows_card else max(top, 1)

    @property
    def shows_card(self) -> bool:
        """Whether the card's size is drawn as a line."""
        return self.card is not None and max(self.peaks, default=0) >= _CARD_LINE_FROM * self.card


def series_of(timeline: Timeline) -> PlotSeries:
    """The columns of a timeline: owners at the end of each block and the peak inside it."""
    ends = [end for end in timeline.block_ends if end.block is not None]
    held = [{owner.label: max(owner.bytes, 0) for owner in end.owners} for end in ends]
    largest: dict[str, int] = {}
    for by_owner in held:
        for label, size in by_owner.items():
            largest[label] = max(largest.get(label, 0), size)
    ranked = sorted(largest, key=lambda label: -largest[label])
    named, others = ranked[:_NAMED_OWNERS], ranked[_NAMED_OWNERS:]
    # What grew lies on top of what was there from the start, or it would lift everything.
    named.sort(key=lambda label: -held[0].get(label, 0))
    owners = {label: tuple(by_owner.get(label, 0) for by_owner in held) for label in named}
    if others:
        smaller = tuple(sum(by_owner.get(label, 0) for label in others) for by_owner in held)
        owners = {_SMALLER: smaller} | owners
    peaks = {end.block: 0 for end in ends}
    for record in timeline.records:
        if record.block in peaks:
            reading = record.reading
            size = reading.allocated if reading.peak is None else reading.peak
            peaks[record.block] = max(peaks[record.block], size)
    return PlotSeries(
        blocks=tuple(end.block or 0 for end in ends),
        width=timeline.stride,
        owners=owners,
        peaks=tuple(peaks.values()),
        events=tuple(_events(timeline)),
        card=timeline.card_bytes,
    )


def plot_timeline(timeline: Timeline, title: str, *, width: int = 960, height: int = 640) -> Image.Image:
    """Draw the timeline.

    Args:
        timeline: with one block or more.
        title: the line above it.
        width: of the picture, in pixels.
        height: of the picture, in pixels.

    Raises:
        ValueError: the timeline has no block.
    """
    series = series_of(timeline)
    if not series.blocks:
        raise ValueError("the timeline has no whole block: let the stream make one before plotting it.")
    scale = _OVERSAMPLING
    image = Image.new("RGB", (width * scale, height * scale), _BACKGROUND)
    _Plot(ImageDraw.Draw(image), series, width * scale, height * scale).draw(title, timeline.device)
    return image.resize((width, height), Image.Resampling.LANCZOS)


class _Plot:
    """One drawing: places of axes and legend, and the scale from bytes and blocks to pixels."""

    def __init__(self, draw: ImageDraw.ImageDraw, series: PlotSeries, width: int, height: int) -> None:
        self._draw = draw
        self._series = series
        self._size = height // 28
        self._font = ImageFont.load_default(self._size)
        self._width = width
        entries = len(series.owners) + 1 + series.shows_card
        self._legend_rows = math.ceil(entries / 2)
        line = self._size * 1.45
        left, top = self._size * 5.2, self._size * 3.6
        bottom = height - line * (self._legend_rows + 0.6) - self._size * 3.2
        self._box: Box = (left, top, width - self._size * 1.5, bottom)
        self._unit, self._unit_name = unit_for(series.top)
        self._tick = _nice_step(series.top / self._unit, 5)
        self._y_top = math.ceil(series.top / self._unit / self._tick + 0.02) * self._tick
        self._first = series.blocks[0]
        self._last = series.blocks[-1] + series.width

    def draw(self, title: str, device: str) -> None:
        """Everything, back to front."""
        self._draw_axes(title, device)
        self._draw_grid()
        self._draw_areas()
        self._draw_line(self._series.peaks, _PEAK)
        self._draw_card()
        self._draw_events()
        self._draw_legend()

    def _x(self, block: float) -> float:
        left, _, right, _ = self._box
        return left + (right - left) * (block - self._first) / (self._last - self._first)

    def _y(self, size: float) -> float:
        _, top, _, bottom = self._box
        return bottom - (bottom - top) * size / self._unit / self._y_top

    def _text(self, x: float, y: float, text: str, anchor: str, colour: str = _INK) -> None:
        self._draw.text((x, y), text, fill=colour, font=self._font, anchor=anchor)

    def _draw_axes(self, title: str, device: str) -> None:
        left, _, right, bottom = self._box
        self._text(self._size * 0.8, self._size * 1.2, _shorten(title, self._font, self._width - self._size * 2), "lm")
        card = "" if self._series.card is None else f", card {format_bytes(self._series.card)}"
        self._text(self._size * 0.8, self._size * 2.6, f"{self._unit_name} on {device}{card}", "lm", _GREY_INK)
        step = max(1, round(_nice_step(self._last - self._first, 8)))
        # Records count blocks from 0, people from 1.
        for number in range(math.ceil((self._first + 1) / step) * step, self._last + 1, step):
            x = self._x(number - 1 + self._series.width / 2)
            self._draw.line((x, bottom, x, bottom + self._size * 0.35), fill=_INK, width=2)
            self._text(x, bottom + self._size * 0.5, str(number), "ma")
        self._text((left + right) / 2, bottom + self._size * 1.8, "block", "ma")

    def _draw_grid(self) -> None:
        left, top, right, bottom = self._box
        for index in range(round(self._y_top / self._tick) + 1):
            value = index * self._tick
            y = self._y(value * self._unit)
            self._draw.line((left, y, right, y), fill=_GRID if index else _INK, width=2)
            self._text(left - self._size * 0.4, y, f"{value:g}", "rm")
        self._draw.line((left, top, left, bottom), fill=_INK, width=2)

    def _draw_areas(self) -> None:
        base = [0] * len(self._series.blocks)
        for (_, sizes), colour in zip(self._series.owners.items(), self._colours(), strict=True):
            tops = [low + size for low, size in zip(base, sizes, strict=True)]
            for block, low, high in zip(self._series.blocks, base, tops, strict=True):
                if high > low:
                    box = (self._x(block), self._y(high), self._x(block + self._series.width), self._y(low))
                    self._draw.rectangle(box, fill=colour)
            base = tops

    def _draw_line(self, values: Sequence[int], colour: str) -> None:
        points: list[tuple[float, float]] = []
        for block, value in zip(self._series.blocks, values, strict=True):
            points += [(self._x(block), self._y(value)), (self._x(block + self._series.width), self._y(value))]
        self._draw.line(points, fill=colour, width=max(4, self._size // 9), joint="curve")

    def _draw_card(self) -> None:
        if self._series.shows_card and self._series.card is not None:
            left, _, right, _ = self._box
            y = self._y(self._series.card)
            for start in range(int(left), int(right), self._size):
                self._draw.line((start, y, min(start + self._size * 0.6, right), y), fill=_CARD, width=5)

    def _draw_events(self) -> None:
        """A mark per event at the foot of the areas, and the text of the first ones."""
        _, top, right, bottom = self._box
        half = self._size * 0.35
        for number, (block, text) in enumerate(self._series.events):
            x = self._x(block + self._series.width / 2)
            self._draw.polygon([(x, bottom - 2 * half), (x - half, bottom), (x + half, bottom)], fill=_CARD)
            if number < _EVENT_LABELS:
                y = top + self._size * (0.8 + 1.3 * number)
                self._draw.line((x, y, x, bottom), fill=_CARD, width=2)
                anchor, offset = ("rm", -half) if x > right - self._size * 9 else ("lm", half)
                self._text(x + offset, y, text, anchor, _CARD)

    def _draw_legend(self) -> None:
        # In stacking order, from the top down.
        areas = reversed(list(zip(self._series.owners, self._colours(), strict=True)))
        entries = [(label, colour, True) for label, colour in areas]
        entries.append(("peak in the block", _PEAK, False))
        if self._series.shows_card:
            entries.append(("size of the card", _CARD, False))
        _, _, right, bottom = self._box
        line, column = self._size * 1.45, (right - self._size * 0.8) / 2
        for index, (label, colour, is_area) in enumerate(entries):
            x = self._size * 0.8 + column * (index // self._legend_rows)
            y = bottom + self._size * 4.0 + line * (index % self._legend_rows)
            half = self._size * (0.4 if is_area else 0.1)
            self._draw.rectangle((x, y - half, x + self._size, y + half), fill=colour)
            text = label
            if is_area:
                text = f"{format_bytes(self._series.owners[label][-1])}  {label}"
            self._text(x + self._size * 1.5, y, _shorten(text, self._font, column - self._size * 2.5), "lm")

    def _colours(self) -> list[str]:
        colours = iter(_COLOURS)
        return [_GREY if label == _SMALLER else next(colours) for label in self._series.owners]


def _events(timeline: Timeline) -> list[tuple[int, str]]:
    """Events of the records, and increases of the allocator's retries and failures; each text once per block."""
    events: list[tuple[int, str]] = []
    retries = ooms = None
    for record in timeline.records:
        block = record.block
        if block is None:
            continue
        if record.event and (block, record.event) not in events:
            events.append((block, record.event))
        if record.stage == BLOCK_END:
            if retries is not None and (record.reading.retries or 0) > retries:
                events.append((block, "allocation retried"))
            if ooms is not None and (record.reading.ooms or 0) > ooms:
                events.append((block, "out of memory"))
            retries, ooms = record.reading.retries, record.reading.ooms
    # An event that repeats from block to block is shown once: with cleanup 'every block' there is one in each.
    return [event for event in events if event[1] not in {text for block, text in events if block == event[0] - 1}]


def _nice_step(span: float, steps: int) -> float:
    """1, 2 or 5 times a power of ten that divides `span` into about `steps`."""
    rough = max(span, 1e-9) / steps
    power = 10.0 ** math.floor(math.log10(rough))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)


def _shorten(text: str, font: Font, width: float) -> str:
    """`text`, cut with an ellipsis where it is wider than `width` pixels."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "...") > width:
        text = text[:-1]
    return text + "..."
