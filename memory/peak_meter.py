"""The largest number of tensor bytes alive at once inside a piece of code, exactly."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_iter


class PeakMeter(TorchDispatchMode):
    """Counts the storages that torch operations allocate, until they are freed.

    Memory that no torch operation allocates (workspaces of kernels, files read by other libraries) is not counted.
    Slows each operation by some microseconds: for estimates and tests.

    Args:
        meta: count tensors on the meta device and no others, for the figures of a real run by a rehearsal on shapes;
            by default meta tensors are not counted, because they hold no memory.

    Attributes:
        live_bytes: of the storages made inside the `with` block and alive now.
        peak_bytes: the largest that `live_bytes` has been.
    """

    def __init__(self, *, meta: bool = False) -> None:
        super().__init__()
        self._meta = meta
        self.live_bytes = 0
        self.peak_bytes = 0
        self._storages: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # noqa: ANN401
        out = func(*args, **(kwargs or {}))
        # A view of an argument, such as a weight's transpose, is not new memory.
        given = {storage._cdata for storage in _storages((args, kwargs))}
        for storage in _storages(out):
            if storage._cdata not in given and (storage.device.type == "meta") == self._meta:
                self._count(storage)
        return out

    def _count(self, storage: torch.UntypedStorage) -> None:
        # torch keeps a storage's Python object for as long as the storage lives, so the weak reference dies with it.
        key = storage._cdata
        if key in self._storages:
            return
        size = storage.nbytes()

        def freed(_: weakref.ref[torch.UntypedStorage]) -> None:
            self.live_bytes -= size
            self._storages.pop(key, None)

        self._storages[key] = weakref.ref(storage, freed)
        self.live_bytes += size
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)


def _storages(values: Any) -> Iterator[torch.UntypedStorage]:  # noqa: ANN401
    for value in tree_iter(values):
        if isinstance(value, torch.Tensor) and not is_traceable_wrapper_subclass(value):
            yield value.untyped_storage()
