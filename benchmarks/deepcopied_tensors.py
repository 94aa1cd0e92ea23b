"""Counts the tensors that `copy.deepcopy` copies, for benchmarks and tests."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch


@dataclass
class DeepcopyCount:
    """Tensors that `copy.deepcopy` copied, and the bytes of their storages."""

    tensors: int = 0
    bytes: int = 0


@contextmanager
def count_deepcopied_tensors() -> Iterator[DeepcopyCount]:
    """Count what `copy.deepcopy` copies of tensors inside the `with` block. For measuring only: not thread-safe."""
    count = DeepcopyCount()
    original = torch.Tensor.__deepcopy__

    def counting(tensor: torch.Tensor, memo: dict[int, Any]) -> torch.Tensor:
        if id(tensor) not in memo:
            count.tensors += 1
            count.bytes += tensor.untyped_storage().nbytes()
        return original(tensor, memo)

    torch.Tensor.__deepcopy__ = counting  # type: ignore[method-assign]
    try:
        yield count
    finally:
        torch.Tensor.__deepcopy__ = original  # type: ignore[method-assign]
