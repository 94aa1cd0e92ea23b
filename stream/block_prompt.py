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
        coming_from: in a transition, the shares at the block's start, `parts` being those at its end; None where the
            whole block has one mix.
    """

    parts: tuple[tuple[str, float], ...]
    interpolation: str = LINEAR
    cut: bool = False
    coming_from: tuple[tuple[str, float], ...] | None = None

    @classmethod
    def of(cls, prompt: str | BlockPrompt) -> BlockPrompt:
        """A prompt alone, or what is a `BlockPrompt` already."""
        return prompt if isinstance(prompt, BlockPrompt) else cls(((prompt, 1.0),))

    @property
    def is_mixed(self) -> bool:
        """Whether it has more than one prompt."""
        return len(self.parts) > 1 or self.coming_from is not None

    @property
    def texts(self) -> tuple[str, ...]:
        """Every prompt once."""
        return tuple(dict.fromkeys(text for text, _ in (*(self.coming_from or ()), *self.parts)))

    @property
    def name(self) -> str:
        """The prompt; of a mix "0.25 a calm sea + 0.75 storm". Equal for equal embeddings, and for nothing else."""
        name = _name_of(self.parts)
        if self.coming_from is not None:
            name = f"{_name_of(self.coming_from)} -> {name}"
        return name if self.interpolation == LINEAR or not self.is_mixed else f"{name} ({self.interpolation})"

    def shares_by_frame(self, frames: int) -> tuple[tuple[tuple[str, float], ...], ...]:
        """The shares of each of a block's latent frames in a transition; else one for all frames."""
        if self.coming_from is None:
            return (self.parts,)
        return tuple(mix_shares(self.coming_from, self.parts, (frame + 1) / frames) for frame in range(frames))


def mix_shares(
    start: Iterable[tuple[str, float]], end: Iterable[tuple[str, float]], share: float
) -> tuple[tuple[str, float], ...]:
    """Shares on the way from `start` to `end`: 0 is the start."""
    before = [(text, weight * (1.0 - share)) for text, weight in start]
    return shares_of([*before, *((text, weight * share) for text, weight in end)])


def shares_of(weighted: Iterable[tuple[str, float]]) -> tuple[tuple[str, float], ...]:
    """Prompts with weights of 0 or more, not all 0, as `BlockPrompt.parts`: each once, those of weight 0 left out."""
    sums: dict[str, float] = {}
    for text, weight in weighted:
        sums[text] = sums.get(text, 0.0) + weight
    whole = sum(sums.values())
    return tuple((text, weight / whole) for text, weight in sums.items() if weight > 0)


def _name_of(parts: tuple[tuple[str, float], ...]) -> str:
    if len(parts) == 1:
        return parts[0][0]
    return " + ".join(f"{share:.6g} {text}" for text, share in parts)
