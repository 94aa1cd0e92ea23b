"""The latents that a stream has decoded last: megabytes in the place of the decoder's cache, which is gigabytes."""

from __future__ import annotations

import torch


class DecodedLatents:
    """Keeps copies on the CPU, as many as the decoder's cache depends on.

    Attributes:
        is_whole: whether decoding them again leaves the decoder as it is: not, where the stream came without those
            that its decoder has seen.
    """

    def __init__(self) -> None:
        self._kept: list[torch.Tensor] = []
        self._from_the_start = True
        self._reach = 0

    @property
    def is_whole(self) -> bool:
        """See the class."""
        return self._from_the_start or (self._reach > 0 and self._frames >= self._reach)

    def begin_with(self, latents: torch.Tensor | None) -> None:
        """The decoder has decoded what leaves it as `latents` do; None for what nobody knows."""
        copied = None if latents is None else latents.detach().to("cpu", torch.float32, copy=True)
        # By frames, so that each can be dropped.
        self._kept = [] if copied is None else [frame.clone() for frame in copied.split(1, dim=2)]
        self._from_the_start = latents is not None

    def add(self, latents: torch.Tensor, reach: int) -> None:
        """The decoder has decoded `latents` [1, channels, frames, height, width]; its cache depends on `reach`."""
        self._reach = reach
        self._kept.append(latents.detach().to("cpu", torch.float32, copy=True))
        while self._frames - self._kept[0].shape[2] >= reach:
            # What is left is as good as all.
            del self._kept[0]

    def copy(self) -> DecodedLatents:
        """What it is now; shares the tensors, which nobody writes to."""
        other = DecodedLatents()
        other._kept, other._from_the_start, other._reach = list(self._kept), self._from_the_start, self._reach
        return other

    def joined(self) -> torch.Tensor | None:
        """All that is kept, float32 [1, channels, frames, height, width]; None where it is not whole."""
        if not self._kept or not self.is_whole:
            return None
        return torch.cat(self._kept, dim=2)[:, :, -self._reach :].clone()

    @property
    def _frames(self) -> int:
        return sum(kept.shape[2] for kept in self._kept)
