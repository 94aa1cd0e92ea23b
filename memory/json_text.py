"""JSON that every reader takes: RFC 8259 has no NaN and no infinity, which Python writes nevertheless."""

from __future__ import annotations

import json
import math
from typing import Any


def json_text(value: Any, indent: int | None = None) -> str:  # noqa: ANN401
    """`value` as JSON text, with null for numbers that are not finite."""
    try:
        return json.dumps(value, indent=indent, allow_nan=False)
    except ValueError:
        # Rare: only then is all of it gone through.
        return json.dumps(_finite(value), indent=indent, allow_nan=False)


def _finite(value: Any) -> Any:  # noqa: ANN401
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {_key(key): _finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    return value


def _key(key: Any) -> Any:  # noqa: ANN401
    return str(key) if isinstance(key, float) and not math.isfinite(key) else key
