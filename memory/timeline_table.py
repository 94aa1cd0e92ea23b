"""The timeline as a text table: stages and owners by value and growth per block."""

from __future__ import annotations

from collections.abc import Sequence

from .byte_text import format_bytes
from .growth import FEWEST_POINTS, FIRST_STEADY_BLOCK, Slope, Verdict, fit_slope
from .timeline import StageRecord, Timeline

_STAGE_HEADER = ("stage", "allocated", "peak", "reserved", "growth per block")
_OWNER_HEADER = ("owner", "third block", "last block", "growth per block")


def write_table(timeline: Timeline, verdict: Verdict) -> str:
    """Verdict, stages, owners and counters as Markdown tables.

    A stage's bytes are those of the last block it ran in; its growth is the slope over the blocks from the third on.
    """
    parts = [verdict.sentence, _summary(timeline), _rows(_STAGE_HEADER, _stage_rows(timeline))]
    owners = _owner_rows(timeline)
    if owners:
        parts.append(_rows(_OWNER_HEADER, owners))
    counters = _counters(timeline)
    if counters:
        parts.append(counters)
    return "\n\n".join(parts) + "\n"


def _summary(timeline: Timeline) -> str:
    text = f"{timeline.device}, {timeline.blocks} blocks"
    if timeline.card_bytes is not None:
        text += f", card of {format_bytes(timeline.card_bytes)}"
    if timeline.peak is not None:
        text += f", peak {format_bytes(timeline.peak)}"
    if timeline.stride > 1:
        text += f"; every {timeline.stride}th block is recorded"
    return text + "."


def _stage_rows(timeline: Timeline) -> list[tuple[str, ...]]:
    # In the order of the last block, because the first has no context yet; stages that ran only earlier come first.
    last_block = timeline.records[-1].block if timeline.records else None
    latest = {record.stage: None for record in timeline.stages_of(last_block)}
    earlier = [record.stage for record in timeline.records if record.stage not in latest]
    by_stage: dict[str, list[StageRecord]] = {stage: [] for stage in [*earlier, *latest]}
    for record in timeline.records:
        by_stage[record.stage].append(record)
    rows: list[tuple[str, ...]] = []
    for stage, records in by_stage.items():
        last = records[-1].reading
        growth = _slope(records, [record.reading.held for record in records])
        rows.append((stage, _text(last.allocated), _text(last.peak), _text(last.reserved), _text(growth)))
    return rows


def _owner_rows(timeline: Timeline) -> list[tuple[str, ...]]:
    ends = [end for end in timeline.block_ends if end.owners]
    if not ends:
        return []
    held = [{owner.label: owner.bytes for owner in end.owners} for end in ends]
    steady = next((index for index, end in enumerate(ends) if (end.block or 0) >= FIRST_STEADY_BLOCK), len(ends) - 1)
    labels = list(dict.fromkeys(label for by_owner in reversed(held) for label in by_owner))
    labels.sort(key=lambda label: -held[-1].get(label, 0))
    rows: list[tuple[str, ...]] = []
    for label in labels:
        values = [by_owner.get(label, 0) for by_owner in held]
        rows.append((label, _text(values[steady]), _text(values[-1]), _text(_slope(ends, values))))
    return rows


def _counters(timeline: Timeline) -> str:
    if not timeline.block_ends:
        return ""
    last = timeline.block_ends[-1]
    named = (
        ("cached in pieces that cannot be returned to the card (inactive split)", last.reading.inactive_split, True),
        ("reserved by CUDA graphs (private pools)", last.reading.private_pools, True),
        ("in use on the card outside torch's allocator", last.reading.outside, True),
        ("allocations that fit only after the cache was emptied (retries)", last.reading.retries, False),
        ("allocations that did not fit", last.reading.ooms, False),
    )
    lines = [f"- {name}: {format_bytes(n) if is_size else n}" for name, n, is_size in named if n is not None]
    if last.caches is not None:
        caches = last.caches
        lines.append(
            f"- torch.compile: {caches.dynamo_entries} compiled variants of {caches.code_objects} functions, "
            f"{caches.inductor_modules} generated modules"
        )
    events = [f"- block {(record.block or 0) + 1}: {record.event}" for record in timeline.records if record.event]
    shown = 12
    more = [f"- and {len(events) - shown} more events"] if len(events) > shown else []
    return "\n".join([*lines, *events[:shown], *more])


def _slope(records: Sequence[StageRecord], values: Sequence[int]) -> Slope | None:
    pairs = [
        (float(record.block), value)
        for record, value in zip(records, values, strict=True)
        if record.block is not None and record.block >= FIRST_STEADY_BLOCK
    ]
    if len(pairs) < FEWEST_POINTS:
        return None
    return fit_slope([block for block, _ in pairs], [value for _, value in pairs])


def _text(value: int | Slope | None) -> str:
    if value is None:
        return "-"
    return str(value) if isinstance(value, Slope) else format_bytes(value)


def _rows(header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    widths = [max(len(row[column]) for row in (header, *rows)) for column in range(len(header))]
    lines = [header, tuple("-" * width for width in widths), *rows]
    return "\n".join(
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in lines
    )
