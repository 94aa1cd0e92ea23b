"""The families of models that the pack streams with blocks of its own."""

from __future__ import annotations

from pathlib import Path

from ..families.model_family import ModelFamily
from ..families.stream_preset import StreamPreset
from ..wan.family import CAUSAL_WAN_21, CAUSAL_WAN_22_5B

FAMILIES: tuple[ModelFamily, ...] = (CAUSAL_WAN_21, CAUSAL_WAN_22_5B)


def recognise_family(model: Path) -> ModelFamily:
    """The family of the transformer in `model`, a pipeline folder or a single file.

    If no family recognises it, the first one, whose components then report what is wrong.

    Raises:
        CheckpointError: a file cannot be read.
    """
    return next((family for family in FAMILIES if family.recognises(model)), FAMILIES[0])


def preset_names() -> list[str]:
    """The names of all presets, family by family."""
    return [preset.name for family in FAMILIES for preset in family.presets]


def find_preset(name: str) -> StreamPreset:
    """The preset of that name.

    Raises:
        ValueError: there is none.
    """
    for family in FAMILIES:
        for preset in family.presets:
            if preset.name == name:
                return preset
    raise ValueError(f"preset is {name!r}: choose one of {', '.join(preset_names())}.")
