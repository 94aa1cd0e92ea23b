"""Who holds the memory: every byte of the device attributed to an owner."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from .tensor_bytes import storages_of, tensors_in

WEIGHTS = "weights"
STATE = "state"
MODULE = "module"
MASKS = "block masks"
PICTURES = "pictures"
OTHER_MODELS = "other models"
REST = "rest"

_MODULE_INTERNALS = frozenset({"_parameters", "_buffers", "_modules"})
_MAY_HOLD = frozenset({list, tuple, dict, OrderedDict, deque})


@dataclass(frozen=True)
class Owner:
    """A holder of memory.

    Attributes:
        kind: "weights", "state", "module" (tensors a module keeps besides its weights), "block masks", "pictures",
            "other models" (ComfyUI's) or "rest".
        name: component and format of weights ("transformer float8_e4m3fn"), key of the state, component and
            attribute of a module; empty for the rest.
        bytes: that it holds and no owner before it in the list does.
    """

    kind: str
    name: str
    bytes: int

    @property
    def label(self) -> str:
        """For legends and tables."""
        return f"{self.kind}: {self.name}" if self.name else self.kind


@dataclass(frozen=True)
class Holders:
    """Where to look for tensors.

    Attributes:
        components: of the pipeline, by name; only modules are looked at.
        state: entries of the stream's state, by key.
        others: kind, then name, then any value with tensors inside.
    """

    components: Mapping[str, Any]
    state: Mapping[str, Any]
    others: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


class OwnerLedger:
    """Attributes each byte on one kind of device to an owner, each storage once.

    Weights hardly ever change, and walking through the modules of a 14B model takes some milliseconds. They are counted
    again only when a module was replaced, or when the rest changed, which says that memory changed unseen.

    Args:
        device_type: "cpu", "cuda", ...
    """

    def __init__(self, device_type: str) -> None:
        self._device_type = device_type
        self._modules: dict[tuple[str, str], int] = {}
        self._fixed: list[tuple[str, str, dict[int, int]]] = []
        self._rest: int | None = None

    def count(self, holders: Holders, total: int | None, *, tolerance: int = 0) -> tuple[Owner, ...]:
        """Owners by the order in which they claim shared storages: weights, state, others, modules' own, rest.

        Args:
            holders: where to look.
            total: bytes in use on the device; None when unknown: then there is no rest, and all modules are walked
                through.
            tolerance: bytes by which the rest may differ from its value at the last walk before there is another.
        """
        if total is not None and not self._module_was_replaced(holders):
            owners, rest = self._assign(holders, total)
            if rest is not None and self._rest is not None and abs(rest - self._rest) <= tolerance:
                return owners
        self._walk_through_modules(holders)
        owners, self._rest = self._assign(holders, total)
        return owners

    def held(self, holders: Holders) -> int:
        """Bytes of all owners; modules are walked through only when one was replaced since the last time."""
        if self._module_was_replaced(holders):
            self._walk_through_modules(holders)
        return sum(owner.bytes for owner in self._assign(holders, None)[0])

    def _module_was_replaced(self, holders: Holders) -> bool:
        return _identities(holders) != self._modules

    def _walk_through_modules(self, holders: Holders) -> None:
        self._modules = _identities(holders)
        self._fixed = []
        for kind, values in holders.others.items():
            modules = {name: value for name, value in values.items() if isinstance(value, nn.Module)}
            self._fixed += [(kind, name, self._storages(tensors_in(module))) for name, module in modules.items()]
        for component, module in holders.components.items():
            if isinstance(module, nn.Module):
                self._fixed += [*self._weights_of(component, module), *self._kept_by(component, module)]

    def _assign(self, holders: Holders, total: int | None) -> tuple[tuple[Owner, ...], int | None]:
        groups = [group for group in self._fixed if group[0] == WEIGHTS]
        groups += [(STATE, key, self._storages(tensors_in(value))) for key, value in holders.state.items()]
        for kind, values in holders.others.items():
            loose = {name: value for name, value in values.items() if not isinstance(value, nn.Module)}
            groups += [(kind, name, self._storages(tensors_in(value))) for name, value in loose.items()]
        groups += [group for group in self._fixed if group[0] != WEIGHTS]
        owners: list[Owner] = []
        taken: set[int] = set()
        for kind, name, storages in groups:
            size = sum(size for address, size in storages.items() if address not in taken)
            taken.update(storages)
            if size:
                owners.append(Owner(kind, name, size))
        if total is None:
            return tuple(owners), None
        rest = total - sum(owner.bytes for owner in owners)
        return (*owners, Owner(REST, "", rest)), rest

    def _weights_of(self, component: str, module: nn.Module) -> Iterator[tuple[str, str, dict[int, int]]]:
        by_format: dict[str, list[torch.Tensor]] = {}
        for tensor in (*module.parameters(), *module.buffers()):
            by_format.setdefault(_format_of(tensor), []).extend(tensors_in(tensor))
        for format_, tensors in by_format.items():
            yield WEIGHTS, f"{component} {format_}", self._storages(tensors)

    def _kept_by(self, component: str, module: nn.Module) -> Iterator[tuple[str, str, dict[int, int]]]:
        """Tensors in plain attributes of the module and its sub-modules, such as a VAE's `_feat_map`."""
        by_attribute: dict[str, dict[int, int]] = {}
        seen: set[int] = set()
        for part in module.modules():
            for name, value in vars(part).items():
                # Most attributes are flags, numbers and empty hook tables: a 14B model has 25,000 of them.
                if value.__class__ in _MAY_HOLD:
                    looked_at = bool(value)
                else:
                    looked_at = name == "processor" or isinstance(value, torch.Tensor)
                if looked_at and name not in _MODULE_INTERNALS and not name.endswith("_hooks"):
                    storages = self._storages(tensors_in(value, seen))
                    if storages:
                        by_attribute.setdefault(name, {}).update(storages)
        for name, storages in by_attribute.items():
            yield MODULE, f"{component}.{name}", storages

    def _storages(self, tensors: Iterable[torch.Tensor]) -> dict[int, int]:
        return storages_of(tensors, self._device_type)


def _identities(holders: Holders) -> dict[tuple[str, str], int]:
    groups = {"": holders.components, **holders.others}
    return {
        (kind, name): id(value)
        for kind, values in groups.items()
        for name, value in values.items()
        if isinstance(value, nn.Module)
    }


def _format_of(tensor: torch.Tensor) -> str:
    """The dtype that most of the tensor is stored in: for a quantized one that of its data, not its logical dtype."""
    if not is_traceable_wrapper_subclass(tensor):
        return str(tensor.dtype).removeprefix("torch.")
    parts = list(tensors_in(tensor))
    largest = max(parts, key=lambda part: part.untyped_storage().nbytes())
    return str(largest.dtype).removeprefix("torch.")
