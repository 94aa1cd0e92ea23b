"""The choices of which pictures stay in memory: light, because the sampler node's schema lists them."""

from __future__ import annotations

from enum import Enum


class KeepFrames(str, Enum):
    """Which pictures stay in memory for the IMAGE output."""

    ALL = "all"
    LAST_BLOCK = "last block"
    NONE = "none"
