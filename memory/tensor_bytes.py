"""Exact counts of tensor memory: what is alive and what a value holds."""

from __future__ import annotations

import gc
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from types import ModuleType
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass


def live_tensor_bytes(device_type: str | None = None, *, collect: bool = True) -> int:
    """Bytes of all tensors alive in this process, each storage once.

    Tensors on the meta device hold no memory and do not count.

    Args:
        device_type: "cpu", "cuda", ... to count one kind of device only.
        collect: collect garbage in reference cycles first, so that the figure says what is held.
    """
    if collect:
        gc.collect()
    found = (obj for obj in gc.get_objects() if issubclass(type(obj), torch.Tensor))
    return _storage_bytes(found, device_type)


def held_tensor_bytes(value: Any) -> int:  # noqa: ANN401
    """Bytes of the tensors inside `value` (tensors, containers, modules, attributes), each storage once."""
    return _storage_bytes(tensors_in(value), None)


def module_bytes(module: nn.Module) -> int:
    """Bytes of a module's parameters and buffers as they are stored: quantized ones at their quantized size."""
    return held_tensor_bytes([*module.parameters(), *module.buffers()])


def _storage_bytes(tensors: Iterable[torch.Tensor], device_type: str | None) -> int:
    return sum(storages_of(tensors, device_type).values())


def storages_of(tensors: Iterable[torch.Tensor], device_type: str | None = None) -> dict[int, int]:
    """Storages of `tensors`: bytes by address, so that a shared storage counts once.

    Args:
        tensors: those without storage of their own (meta, fake, quantized wrappers) do not count.
        device_type: "cpu", "cuda", ... to count one kind of device only.
    """
    storages: dict[int, int] = {}
    for tensor in tensors:
        if is_traceable_wrapper_subclass(tensor) or isinstance(tensor, FakeTensor):
            # A quantized tensor is a wrapper that states its logical size; its parts are tensors of their own.
            # Fake tensors, which torch.compile leaves behind, hold no memory.
            continue
        if tensor.is_meta or (device_type is not None and tensor.device.type != device_type):
            continue
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
    return storages


def tensors_in(value: Any, seen: set[int] | None = None) -> Iterator[torch.Tensor]:  # noqa: ANN401
    """The tensors inside `value`: tensors, containers, modules, and the attributes of other objects.

    Args:
        value: what to look through.
        seen: identities of objects to skip; those visited are added.
    """
    return _tensors_in(value, set() if seen is None else seen, 0)


# How deep attributes are followed: a cache object holds layers that hold tensors; deeper lie unrelated object graphs.
_ATTRIBUTE_DEPTH = 4
_HOLD_NOTHING = (str, bytes, int, float, complex, type(None), type, ModuleType, torch.dtype, torch.device)


def _tensors_in(value: Any, seen: set[int], depth: int) -> Iterator[torch.Tensor]:  # noqa: ANN401
    if isinstance(value, _HOLD_NOTHING) or id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, torch.Tensor):
        if is_traceable_wrapper_subclass(value):
            for name in value.__tensor_flatten__()[0]:
                yield from _tensors_in(getattr(value, name), seen, depth)
        else:
            yield value
        return
    if isinstance(value, nn.Module):
        items: Iterable[Any] = (*value.parameters(), *value.buffers())
    elif isinstance(value, Mapping):
        items = list(value.values())
    elif isinstance(value, list | tuple | set | frozenset | deque):
        items = list(value)
    elif callable(value) or depth >= _ATTRIBUTE_DEPTH:
        return
    else:
        items = list(getattr(value, "__dict__", {}).values())
        depth += 1
    for item in items:
        yield from _tensors_in(item, seen, depth)
