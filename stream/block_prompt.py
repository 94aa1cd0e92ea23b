"""What one block is asked to show. No torch: nodes read it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

LINEAR, SLERP = INTERPOLATIONS = ("linear", "slerp")


@dataclass(frozen=True)
class BlockPrompt:
    """What one block is asked to show: a prompt, or several mixed.

    Attributes:
        parts: the prompts, each with its share; the shares are above 0 and add up to 1.
        interpolation: how embeddings are mixed, one of `INTERPOLATIONS`.
        cut: whether the block begins afresh, seeing nothing of the past.
        on_the_way: whether it is a step of a transition that goes on in the next block.
    """

    parts: tuple[tuple[str, float], ...]
    interpolation: str = LINEAR
    cut: bool = False
    on_the_way: bool = False

    @classmethod
    def of(cls, prompt: str | BlockPrompt) -> BlockPrompt:
        """A prompt alone, or what is a `BlockPrompt` already."""
        return prompt if isinstance(prompt, BlockPrompt) else cls(((prompt, 1.0),))

    @property
    def is_mixed(self) -> bool:
        """Whether it has more than one prompt."""
        return len(self.parts) > 1

    @property
    def name(self) -> str:
        """The prompt; of a mix "0.25 a calm sea + 0.75 storm". Equal for equal embeddings, and for nothing else."""
        if not self.is_mixed:
            return self.parts[0][0]
        mixed = " + ".join(f"{share:.6g} {text}" for text, share in self.parts)
        return mixed if self.interpolation == LINEAR else f"{mixed} ({self.interpolation})"


def shares_of(weighted: Iterable[tuple[str, float]]) -> tuple[tuple[str, float], ...]:
    """Prompts with weights of 0 or more, not all 0, as `BlockPrompt.parts`: each once, those of weight 0 left out."""
    sums: dict[str, float] = {}
    for text, weight in weighted:
        sums[text] = sums.get(text, 0.0) + weight
    whole = sum(sums.values())
    return tuple((text, weight / whole) for text, weight in sums.items() if weight > 0)
