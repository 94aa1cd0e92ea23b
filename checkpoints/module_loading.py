"""Fill a module built on the meta device from safetensors files, one tensor at a time.

Memory: the module's own tensors, allocated once on their device in their final dtype, plus the one tensor
being read. No state dict is ever held.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from ..ops.weight_filling import WeightFilling
from .checkpoint_files import (
    CheckpointError,
    TensorHeader,
    TensorSource,
    by_file,
    index_tensors,
    list_component_files,
    open_checkpoint,
    read_headers,
)
from .comfy_format import StoredWeight
from .tensor_reading import dequantized, fill_quantized, observe_all, read_rows

__all__ = [
    "CheckpointError",
    "TensorHeader",
    "TensorSource",
    "destination_dtype",
    "index_tensors",
    "list_component_files",
    "load_weights",
    "read_headers",
    "without_tied",
]

NO_FUSION: Mapping[str, tuple[str, slice]] = MappingProxyType({})
NO_FILLINGS: Mapping[str, WeightFilling] = MappingProxyType({})
NOTHING_STORED: Mapping[str, StoredWeight] = MappingProxyType({})
_NAMES_SHOWN = 3


@dataclass(frozen=True)
class _Slot:
    """Where a source tensor goes: a tensor of the module, or some of its rows."""

    name: str
    rows: slice | None
    shape: tuple[int, ...]
    floating: bool


@dataclass(frozen=True)
class _Loading:
    """What placing a tensor needs to know: `load_weights`' arguments."""

    module: nn.Module
    sources: Mapping[str, TensorSource]
    headers: Mapping[str, TensorHeader]
    slots: Mapping[str, _Slot]
    device: torch.device | str
    dtype: torch.dtype
    keep_fp32: Collection[str]
    fillings: Mapping[str, WeightFilling]
    stored: Mapping[str, StoredWeight]


def load_weights(
    module: nn.Module,
    sources: Mapping[str, TensorSource],
    *,
    device: torch.device | str,
    dtype: torch.dtype,
    keep_fp32: Collection[str] = (),
    fused: Mapping[str, tuple[str, slice]] = NO_FUSION,
    fillings: Mapping[str, WeightFilling] = NO_FILLINGS,
    stored: Mapping[str, StoredWeight] = NOTHING_STORED,
    on_tensor: Callable[[str, int], None] | None = None,
) -> None:
    """Fill `module`, built under `init_empty_weights(include_buffers=False)`, from `sources`.

    Parameters and persistent buffers are allocated on `device`; floating-point ones in `dtype`, or in
    float32 where a dotted part of the name is in `keep_fp32`; integers and bools as stored. `fused` sends a
    source's name to rows of another parameter. Parameters tied to one another become one tensor, whichever
    of their names `sources` has. Parameters in `fillings` are filled quantized and stay meta tensors in the module:
    the caller puts the finished layers in. Sources in `stored` are quantized in their file: a filling takes them as
    they are, elsewhere they are dequantized. Non-persistent buffers are moved to `device`. Parameters come out with
    `requires_grad=False`. `on_tensor(name, nbytes)` is called after each tensor with the bytes it takes.

    Raises CheckpointError for missing or unexpected names, wrong shapes, and integers where floating-point
    weights belong (or the reverse), before anything is allocated; ValueError for inf or NaN in what is quantized.
    """
    aliases = _aliases(module)
    sources = without_tied(sources, aliases)
    slots = _slots(module, aliases, fused)
    _check_names(slots, sources)
    headers = read_headers(sources)
    _check_headers(slots, sources, headers, stored)
    loading = _Loading(module, sources, headers, slots, device, dtype, keep_fp32, fillings, stored)
    # Under ComfyUI this runs in inference mode, whose tensors could never be changed outside of it (LoRA).
    with torch.inference_mode(False), torch.no_grad():
        for file, names in by_file(sources).items():
            with open_checkpoint(file, device) as opened:
                for name in names:
                    placed = _place(loading, name, opened)
                    if on_tensor is not None:
                        on_tensor(name, placed)
        _tie(module, aliases)
        _move_other_buffers(module, device)


def destination_dtype(name: str, stored: torch.dtype, dtype: torch.dtype, keep_fp32: Collection[str]) -> torch.dtype:
    """The dtype a tensor called `name`, stored as `stored`, gets in a module loaded as `dtype`."""
    if not stored.is_floating_point:
        return stored
    kept = any(part in keep_fp32 for part in name.split("."))
    return torch.float32 if kept else dtype


def without_tied(sources: Mapping[str, TensorSource], aliases: Mapping[str, str]) -> dict[str, TensorSource]:
    """`sources` with each tied name once, under the name in `aliases`' values; other names unchanged."""
    renamed = {name: source for name, source in sources.items() if name not in aliases}
    for alias, name in aliases.items():
        if alias in sources:
            renamed.setdefault(name, sources[alias])
    return renamed


def _place(loading: _Loading, name: str, opened: Any) -> int:  # noqa: ANN401
    """Read the tensor `name`, convert it and put it where it belongs; the bytes it takes there.

    The one place every tensor passes through. It is always copied: on the CPU what is read is a view of the file.
    """
    slot, source, header = loading.slots[name], loading.sources[name], loading.headers[name]
    stored, filling = loading.stored.get(name), loading.fillings.get(slot.name)
    if filling is not None:
        if filling.must_observe and stored is None:
            parts = [part for part, other in loading.slots.items() if other.name == slot.name]
            observe_all(filling, [(loading.sources[part], loading.headers[part]) for part in parts])
        start = slot.rows.start if slot.rows is not None else 0
        same_file = stored is not None and stored.scale.file == source.file
        return fill_quantized(
            filling, start, read_rows(opened, source.key, header), stored, opened if same_file else None
        )
    kind = header.dtype if stored is None else torch.float32
    final = destination_dtype(slot.name, kind, loading.dtype, loading.keep_fp32)
    target = _allocated(loading.module, slot.name, loading.device, final)
    part = target if slot.rows is None else target[slot.rows]
    chunks = read_rows(opened, source.key, header)
    for rows, values in chunks if stored is None else dequantized(chunks, stored):
        part[rows].copy_(values)
    return part.numel() * part.element_size()


def _allocated(module: nn.Module, name: str, device: torch.device | str, dtype: torch.dtype) -> torch.Tensor:
    """The parameter or buffer called `name`, given memory when it is still a meta tensor."""
    owner, leaf = _owner(module, name)
    current = getattr(owner, leaf)
    if not current.is_meta and leaf in owner._parameters:
        return current
    fresh = torch.empty(current.shape, device=device, dtype=dtype)
    if leaf in owner._parameters:
        owner._parameters[leaf] = nn.Parameter(fresh, requires_grad=False)
    else:
        owner._buffers[leaf] = fresh
    return fresh


def _owner(module: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, leaf = name.rpartition(".")
    return module.get_submodule(path), leaf


def _persistent_tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = dict(module.named_parameters(remove_duplicate=False))
    for path, owner in module.named_modules():
        for leaf, buffer in owner._buffers.items():
            if buffer is not None and leaf not in owner._non_persistent_buffers_set:
                tensors[f"{path}.{leaf}" if path else leaf] = buffer
    return tensors


def _aliases(module: nn.Module) -> dict[str, str]:
    """Names of tied parameters, each with the name under which the tensor is loaded.

    Tied are parameters which are one object, and those that transformers declares so: its models are tied
    after construction, and for UMT5 only when the config says so, which Wan's does not.
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


def _slots(module: nn.Module, aliases: Mapping[str, str], fused: Mapping[str, tuple[str, slice]]) -> dict[str, _Slot]:
    """Every name that must be loaded, with where it goes."""
    tensors = {name: tensor for name, tensor in _persistent_tensors(module).items() if name not in aliases}
    parents = {parent for parent, _ in fused.values()}
    slots = {
        name: _Slot(name, None, tuple(tensor.shape), tensor.is_floating_point())
        for name, tensor in tensors.items()
        if name not in parents
    }
    for name, (parent, rows) in fused.items():
        whole = tensors[parent]
        shape = (len(range(whole.shape[0])[rows]), *whole.shape[1:])
        slots[name] = _Slot(parent, rows, shape, whole.is_floating_point())
    return slots


def _check_names(slots: Mapping[str, _Slot], sources: Mapping[str, TensorSource]) -> None:
    missing = [name for name in slots if name not in sources]
    unexpected = [
        name if sources[name].key == name else f"{name} (stored as {sources[name].key})"
        for name in sources
        if name not in slots
    ]
    problems = [f"lacks {_few(missing)}"] * bool(missing) + [f"has unknown {_few(unexpected)}"] * bool(unexpected)
    if problems:
        raise CheckpointError(
            f"The checkpoint {_files(sources)} {' and '.join(problems)}: give the one which this "
            "model's config belongs to."
        )


def _check_headers(
    slots: Mapping[str, _Slot],
    sources: Mapping[str, TensorSource],
    headers: Mapping[str, TensorHeader],
    stored: Collection[str],
) -> None:
    wrong = [
        f"{name} {list(headers[name].shape)} instead of {list(slot.shape)}"
        for name, slot in slots.items()
        if headers[name].shape != slot.shape
    ]
    if wrong:
        raise CheckpointError(
            f"The checkpoint {_files(sources)} has wrong shapes, {_few(wrong)}: give the one which this "
            "model's config belongs to."
        )
    kinds = [
        f"{name} as {header.dtype}"
        for name, header in headers.items()
        if name not in stored and header.dtype.is_floating_point != slots[name].floating
    ]
    if kinds:
        raise CheckpointError(
            f"The checkpoint {_files(sources)} stores {_few(kinds)}, which the model cannot use as it is: "
            "give an unquantized checkpoint."
        )


def _few(names: Iterable[str]) -> str:
    listed = list(names)
    shown = ", ".join(listed[:_NAMES_SHOWN])
    return f"{shown} ({len(listed)} in all)" if len(listed) > _NAMES_SHOWN else shown


def _files(sources: Mapping[str, TensorSource]) -> str:
    files = list(by_file(sources))
    if not files:
        return "(no file)"
    return str(files[0]) if len(files) == 1 else f"{files[0].parent} ({len(files)} files)"


def _tie(module: nn.Module, aliases: Mapping[str, str]) -> None:
    for alias, name in aliases.items():
        owner, leaf = _owner(module, alias)
        source, source_leaf = _owner(module, name)
        owner._parameters[leaf] = source._parameters[source_leaf]


def _move_other_buffers(module: nn.Module, device: torch.device | str) -> None:
    """Move the buffers no file holds, such as the rotary tables, which construction has computed."""
    for path, owner in module.named_modules():
        for leaf in owner._non_persistent_buffers_set:
            buffer = owner._buffers.get(leaf)
            if buffer is not None and buffer.is_meta:
                raise RuntimeError(
                    f"The buffer {path}.{leaf} was never computed: build the module under "
                    "init_empty_weights(include_buffers=False)."
                )
            if buffer is not None:
                owner._buffers[leaf] = buffer.to(device)
