"""Count the tensors that one forward allocates, on the CPU and on a GPU alike."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class AllocationCounter(TorchDispatchMode):
    """Notes every storage that an operation makes; views and in-place results share storages and do not count."""

    def __init__(self, known: list[torch.Tensor]):
        super().__init__()
        self.seen = {tensor.untyped_storage()._cdata for tensor in known}
        self.made: list[tuple[tuple[int, ...], torch.dtype]] = []
        self.kept: list[torch.Tensor] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        for leaf in tree_leaves((args, kwargs)):
            if isinstance(leaf, torch.Tensor):
                self._meet(leaf)
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and self._meet(leaf):
                self.made.append((tuple(leaf.shape), leaf.dtype))
        return result

    def _meet(self, tensor: torch.Tensor) -> bool:
        key = tensor.untyped_storage()._cdata
        if key in self.seen:
            return False
        self.seen.add(key)
        # Kept alive, so that no later storage can take the address of a freed one.
        self.kept.append(tensor)
        return True


def count_forward_allocations(module: torch.nn.Module, x: torch.Tensor) -> list[tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of each tensor that `module(x)` allocates after one warm-up forward, in order."""
    with torch.no_grad():
        module(x)
        counter = AllocationCounter([x, *module.parameters(), *module.buffers()])
        with counter:
            module(x)
    return counter.made
