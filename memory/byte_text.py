"""Bytes as people read them."""

from __future__ import annotations

_UNITS = ((1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB"))


def format_bytes(size: float) -> str:
    """In the largest unit that gives 1 or more, to three digits; whole bytes below 1 KiB."""
    for unit, name in _UNITS:
        if abs(size) >= unit:
            value = size / unit
            return f"{value:.{2 if abs(value) < 10 else 1 if abs(value) < 100 else 0}f} {name}"
    return f"{size:.0f} bytes" if float(size).is_integer() else f"{size:.1f} bytes"


def format_gb(size: float) -> str:
    """In GB of 1e9 bytes, as cards and files are sold and listed, to one digit behind the point."""
    return f"{size / 1e9:.1f} GB"


def unit_for(size: float) -> tuple[int, str]:
    """The unit, in bytes and by name, for an axis that ends at `size`: GiB from 1 GiB on, else MiB, else KiB."""
    for unit, name in _UNITS:
        if size >= unit:
            return unit, name
    return 1, "bytes"
