"""The families of models that the pack streams with blocks of its own."""

from __future__ import annotations

from pathlib import Path

from ..families.model_family import ModelFamily
from ..wan.family import CAUSAL_WAN_21, CAUSAL_WAN_22_5B

FAMILIES: tuple[ModelFamily, ...] = (CAUSAL_WAN_21, CAUSAL_WAN_22_5B)


def recognise_family(model: Path) -> ModelFamily:
    """The family of the transformer in `model`, a pipeline folder or a single file.

    If no family recognises it, the first one, whose components then report what is wrong.

    Raises:
        CheckpointError: a file cannot be read.
    """
    return next((family for family in FAMILIES if family.recognises(model)), FAMILIES[0])
