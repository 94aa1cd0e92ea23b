"""Which tensors a module needs: parameters and persistent buffers, joined layers by their parts, tied ones once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn


@dataclass(frozen=True)
class Slot:
    """Where a named tensor goes: a tensor of the module, or some of its rows.

    Attributes:
        target: name of the parameter or buffer in the module.
        rows: of `target`; None for all.
        shape: required.
        floating: whether it holds floating-point numbers.
    """

    target: str
    rows: slice | None
    shape: tuple[int, ...]
    floating: bool

    @property
    def start(self) -> int:
        """Its first row in the target."""
        return 0 if self.rows is None else self.rows.start


def find_slots(
    module: nn.Module, aliases: Mapping[str, str], joined: Mapping[str, tuple[str, slice]]
) -> dict[str, Slot]:
    """Every name that must be loaded, with its slot.

    Args:
        module: may be on the meta device.
        aliases: see `find_aliases`; these names are left out.
        joined: names that are rows of another parameter; that parameter is left out.
    """
    tensors = {name: tensor for name, tensor in _persistent_tensors(module).items() if name not in aliases}
    parents = {parent for parent, _ in joined.values()}
    slots = {
        name: Slot(name, None, tuple(tensor.shape), tensor.is_floating_point())
        for name, tensor in tensors.items()
        if name not in parents
    }
    for name, (parent, rows) in joined.items():
        whole = tensors[parent]
        shape = (len(range(whole.shape[0])[rows]), *whole.shape[1:])
        slots[name] = Slot(parent, rows, shape, whole.is_floating_point())
    return slots


def find_aliases(module: nn.Module) -> dict[str, str]:
    """Names of tied parameters, each with the name under which the tensor is loaded.

    Parameters are tied if they are one object, or if transformers declares them tied: it ties its models after
    construction, some only if the config says so.
    """
    aliases: dict[str, str] = {}
    first_names: dict[int, str] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        first = first_names.setdefault(id(parameter), name)
        if first != name:
            aliases[name] = first
    declared = getattr(module, "_tied_weights_keys", None)
    if isinstance(declared, Mapping):
        known = {name for name, _ in module.named_parameters(remove_duplicate=False)}
        aliases |= {
            alias: name for alias, name in declared.items() if {alias, name} <= known and aliases.get(name) != alias
        }
    return aliases


def tie(module: nn.Module, aliases: Mapping[str, str]) -> None:
    """Replace each alias with the parameter of its name."""
    for alias, name in aliases.items():
        owner, leaf = owner_of(module, alias)
        source, source_leaf = owner_of(module, name)
        owner._parameters[leaf] = source._parameters[source_leaf]


def owner_of(module: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The sub-module that a dotted name's tensor belongs to, and its name there."""
    path, _, leaf = name.rpartition(".")
    return module.get_submodule(path), leaf


def _persistent_tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = dict(module.named_parameters(remove_duplicate=False))
    for path, owner in module.named_modules():
        for leaf, buffer in owner._buffers.items():
            if buffer is not None and leaf not in owner._non_persistent_buffers_set:
                tensors[f"{path}.{leaf}" if path else leaf] = buffer
    return tensors
