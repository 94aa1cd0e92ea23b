"""A list of denoising timesteps, as models' makers publish them and users write them. Light: nodes read it."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

from ..checkpoints.checkpoint_error import shown

LARGEST_TIMESTEP = 1000
_RAW = "raw:"
_MOST_LETTERS, _SHOWN_LETTERS = 10_000, 80


@dataclass(frozen=True)
class StepList:
    """Timesteps of the denoising passes of one block, largest first; checked when made.

    Attributes:
        timesteps: above 0 and up to 1000.
        raw: they are the model's own timesteps; False: places in the schedule, which its shift warps towards noise.
    """

    timesteps: tuple[float, ...]
    raw: bool = False

    def __post_init__(self) -> None:
        """Check the list.

        Raises:
            ValueError: it is empty, not falling, or has a number that is no timestep.
        """
        numbers = self.timesteps
        falls = all(larger > smaller for larger, smaller in itertools.pairwise(numbers))
        if not numbers or not falls or not all(0 < number <= LARGEST_TIMESTEP for number in numbers):
            raise ValueError(
                f"the list is {str(self)[:_SHOWN_LETTERS]}: give falling numbers above 0 and up to {LARGEST_TIMESTEP}, "
                "such as 1000, 750, 500, 250."
            )

    @classmethod
    def parse(cls, name: str, text: str) -> StepList | None:
        """The list that a user wrote, such as "1000, 750, 500, 250" or "raw: 700, 500"; None for an empty text.

        Args:
            name: of the input, for the message.
            text: of the user.

        Raises:
            ValueError: it is no such list.
        """
        if len(text) > _MOST_LETTERS:
            raise ValueError(f"{name} has {len(text)} letters: write up to {_MOST_LETTERS}.")
        text = text.strip()
        if not text:
            return None
        raw = text.lower().startswith(_RAW)
        words = text[len(_RAW) if raw else 0 :].replace(",", " ").split()
        try:
            return cls(tuple(float(word) for word in words), raw)
        except ValueError as error:
            raise ValueError(
                f"{name} is {shown(text)}: give falling timesteps above 0 and up to {LARGEST_TIMESTEP}, such as "
                f"'1000, 750, 500, 250', or '{_RAW} 700, 500' for ones that the shift does not change."
            ) from error

    def __len__(self) -> int:
        """How many passes it makes."""
        return len(self.timesteps)

    def __str__(self) -> str:
        """As a user writes it."""
        words = ", ".join(f"{number:g}" if math.isfinite(number) else str(number) for number in self.timesteps)
        return f"{_RAW} {words}" if self.raw else words
