"""Trial launches of GPU code: what failed once is not used again in this process."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field

import torch


@dataclass
class TrialLaunches:
    """The results of this process's trial launches.

    Attributes:
        failed: the error of each name that failed; it is not used again.
        passed: (name, device, dtype, variant) of the trials that succeeded.
    """

    failed: dict[str, str] = field(default_factory=dict)
    passed: set[tuple[str, torch.device, torch.dtype, Hashable]] = field(default_factory=set)

    def succeeds(
        self, name: str, device: torch.device, dtype: torch.dtype, variant: Hashable, launch: Callable[[], None]
    ) -> bool:
        """Whether a trial launch succeeds, or has before for the same device, dtype and variant.

        Args:
            name: what `failed` knows it by.
            device: of the tensors.
            dtype: of the tensors.
            variant: whatever else it is compiled for.
            launch: launches once on a few values; raises where that fails, or the values are wrong.

        Raises:
            torch.OutOfMemoryError: no memory for the trial, which is not counted as failed.
        """
        key = (name, device, dtype, variant)
        if key in self.passed:
            return True
        try:
            launch()
        except Exception as error:
            _raise_what_is_no_fault_of_a_launch(error)
            self.failed[name] = f"{type(error).__name__}: {error}"
            return False
        self.passed.add(key)
        return True

    def reset(self) -> None:
        """Clear all results, for tests."""
        self.failed.clear()
        self.passed.clear()


def _raise_what_is_no_fault_of_a_launch(error: Exception) -> None:
    """Raise errors of the device again: out of memory, or an asynchronous error of earlier work."""
    if isinstance(error, (torch.OutOfMemoryError, getattr(torch, "AcceleratorError", torch.OutOfMemoryError))):
        raise error
    # Triton's message if there is no memory to load the compiled code.
    if isinstance(error, RuntimeError) and "out of memory" in str(error).lower():
        raise torch.OutOfMemoryError(str(error)) from error
