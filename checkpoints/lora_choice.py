"""Which LoRA a user chose, and what became of it; light enough for recipes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class LoraChoice:
    """A LoRA file and how strongly it changes the model; equal choices change it in the same way.

    Attributes:
        path: absolute path of the file.
        strength: factor of its changes; 1 is as it was trained, 0 changes nothing, negative ones turn it around.
        stamp: changes with the file.
    """

    path: str
    strength: float = 1.0
    stamp: str = ""

    def __post_init__(self) -> None:
        """Raise ValueError for a relative path, or a strength that is no finite number."""
        if not Path(self.path).is_absolute():
            raise ValueError(f"lora is {self.path!r}: give the absolute path of a LoRA file.")
        if not math.isfinite(self.strength):
            raise ValueError(f"strength is {self.strength} for the LoRA {Path(self.path).name}: give a finite number.")


@dataclass(frozen=True)
class LoraMatch:
    """What of a LoRA fits the model.

    Attributes:
        choice: the user's.
        layers: of the model that it changes.
        unmatched: names in the file that are no layer of the model.
    """

    choice: LoraChoice
    layers: int
    unmatched: tuple[str, ...] = ()

    @property
    def notice(self) -> str:
        """What the user should know; empty when every name in the file was found."""
        if not self.unmatched:
            return ""
        return (
            f"The LoRA {Path(self.choice.path).name} changes {self.layers} layers; {len(self.unmatched)} other names "
            f"in it, such as {self.unmatched[0]}, are no layer of this model and were left out."
        )

    def describe(self) -> dict[str, Any]:
        """In JSON values."""
        return {
            "file": Path(self.choice.path).name,
            "strength": self.choice.strength,
            "layers": self.layers,
            "names_left_out": len(self.unmatched),
        }
