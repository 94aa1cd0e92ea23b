"""How a component says which of its layers are quantized, and why the others stay."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class LayerPreset:
    """Which layers of a component are quantized, and why the others stay.

    Attributes:
        quantized: full-match pattern of the layer names to quantize.
        stays: search pattern to reason, first match counts.
        otherwise: the reason for layers that no pattern knows.
        stays_in: by format, the same as `stays` for layers that only this format cannot take.
    """

    quantized: re.Pattern[str]
    stays: Mapping[str, str]
    otherwise: str
    stays_in: Mapping[str, Mapping[str, str]] = field(default_factory=dict)

    def reason_to_stay(self, name: str, format_: str) -> str:
        """Why the layer `name` is not quantized to `format_`; empty when it is."""
        if not self.quantized.fullmatch(name):
            return _first_match(self.stays, name) or self.otherwise
        return _first_match(self.stays_in.get(format_, {}), name)


def _first_match(reasons: Mapping[str, str], name: str) -> str:
    return next((reason for pattern, reason in reasons.items() if re.search(pattern, name)), "")
