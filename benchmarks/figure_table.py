"""The printed tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

_COLUMNS = (
    "size", "format", "resolution", "policy", "backend", "compile", "variant", "without", "load s", "load GB",
    "first s", "fps",
    "block ms", "alloc GB", "peak GB", "growth B", "syncs", "recompiles",
)  # fmt: skip


def configurations_table(results: Sequence[Mapping[str, Any]]) -> str:
    """One line per configuration; a failed one shows its reason."""
    rows: list[Sequence[str]] = [_COLUMNS]
    notes = []
    for result in results:
        head = [str(result[key]) for key in _COLUMNS[:8]]
        if "error" in result:
            notes.append(f"{' '.join(head)}: {result['error']}")
            continue
        rows.append([*head, *_figures(result)])
        if "plain" in result:
            rows.append([*head[:4], "plain loop", "off", "-", "none", *_plain_figures(result["plain"])])
    return "\n".join([_aligned(rows), *notes])


def stage_table(result: Mapping[str, Any]) -> str:
    """Measured milliseconds of each stage beside its floors."""
    rows: list[Sequence[str]] = [("stage", "ms", "floor ms", "ratio", "kernel floor ms", "ratio")]
    for stage, milliseconds in sorted(result["stages_ms"].items()):
        floor = result["floors_ms"].get(stage)
        if floor is None:
            rows.append((stage, f"{milliseconds:.2f}", "", "", "", ""))
            continue
        ideal, kernels = floor["ideal"], floor["kernels"]
        rows.append(
            (
                stage,
                f"{milliseconds:.2f}",
                f"{ideal:.3f}",
                f"{milliseconds / ideal:.2f}",
                f"{kernels:.3f}",
                f"{milliseconds / kernels:.2f}",
            )
        )
    return _aligned(rows)


def rates_table(rates: Mapping[str, Any]) -> str:
    """What the device can do, and what of it could not be measured."""
    rows: list[Sequence[str]] = [("rate", "")]
    for kind in ("matrix", "linear", "attention"):
        rows += [(f"{kind} {label}", f"{rate / 1e12:.3f} T op/s") for label, rate in rates[kind].items()]
    rows.append(("copy, read + written", f"{rates['copy'] / 1e9:.1f} GB/s"))
    rows += [(label, f"not measured: {reason}") for label, reason in rates["failures"].items()]
    return "\n".join(f"{label:<40}{value}" for label, value in rows)


def work_table(work: Mapping[str, Mapping[str, int]]) -> str:
    """Operations and bytes by stage, as counted from the shapes."""
    rows: list[Sequence[str]] = [("stage", "TFLOP linear", "attention", "convolution", "GB moved")]
    for stage, counted in sorted(work.items()):
        operations = [f"{counted[kind] / 1e12:.4f}" for kind in ("linear", "attention", "convolution")]
        rows.append((stage, *operations, f"{(counted['bytes'] + counted['linear_bytes']) / 1e9:.3f}"))
    return _aligned(rows)


def _figures(result: Mapping[str, Any]) -> list[str]:
    return [
        f"{result['load_seconds']:.1f}",
        _gigabytes(result["load_peak"]),
        f"{result['first_block_seconds']:.2f}",
        f"{result['fps']:.2f}",
        f"{result['block_ms']:.1f}",
        _gigabytes(result["allocated"]),
        _gigabytes(result["peak"]),
        str(max(result["growth_bytes"], key=abs, default=0)),
        "-" if result["host_syncs"] is None else str(result["host_syncs"]),
        str(result["recompiles_after_block_2"]),
    ]


def _plain_figures(plain: Mapping[str, Any]) -> list[str]:
    if "error" in plain:
        return ["", "", "", "", plain["error"]]
    growth = str(max(plain["growth_bytes"], key=abs, default=0))
    copied = plain["copied_bytes_per_call"][-1] / 1e9
    return [
        "", "", "", f"{plain['fps']:.2f}", f"{plain['block_ms']:.1f}", f"+{copied:.2f} copied",
        _gigabytes(plain["peak"]), growth, "-", "-",
    ]  # fmt: skip


def _gigabytes(count: int | None) -> str:
    return "-" if count is None else f"{count / 1e9:.3f}"


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[column]) for row in rows if column < len(row)) for column in range(len(rows[0]))]
    lines = ("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=False)) for row in rows)
    return "\n".join(lines)
