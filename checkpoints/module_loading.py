"""Fill a module built on the meta device, one tensor at a time.

For each tensor, `sources[name]` gives the rows and the `Destination` of the slot of that name takes them. Memory: the
module's own tensors, allocated once on their device in their final dtype, plus the rows being copied. No state dict is
held, and no file is mapped. All of the module's tensors are allocated before the first row is read: rows that come and
go between them would leave holes in the C library's heap, which a process keeps. Parts that have to lie elsewhere for
want of memory are the exception: each is allocated when the one before is gone.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from types import MappingProxyType

import torch
from torch import nn

from ..ops.weight_filling import WeightFilling
from .checkpoint_files import CheckpointError
from .destinations import Destination, PlainDestination, QuantizedDestination
from .module_slots import Slot, find_aliases, find_slots, owner_of, tie
from .row_sources import QuantizedRows, RowSource

NOTHING_JOINED: Mapping[str, tuple[str, slice]] = MappingProxyType({})
NO_FILLINGS: Mapping[str, WeightFilling] = MappingProxyType({})
_NAMES_SHOWN = 3

OnTensor = Callable[[str, int], None]


def ignore_part(beginning: str) -> None:
    """Leave a part that was loaded where it is."""


def load_weights(
    module: nn.Module,
    sources: Mapping[str, RowSource],
    *,
    device: torch.device | str,
    dtype: torch.dtype,
    keep_fp32: Collection[str] = (),
    joined: Mapping[str, tuple[str, slice]] = NOTHING_JOINED,
    fillings: Mapping[str, WeightFilling] = NO_FILLINGS,
    home_of: Callable[[str], torch.device] | None = None,
    on_tensor: OnTensor | None = None,
    apart: Sequence[str] = (),
    after_part: Callable[[str], None] = ignore_part,
) -> None:
    """Fill `module`, built under `init_empty_weights(include_buffers=False)`, from `sources`.

    Args:
        module: its parameters and persistent buffers are allocated on `device`; floating-point ones in `dtype`, or in
            float32 where a dotted part of the name is in `keep_fp32`; integers and bools as stored. Parameters come
            out with `requires_grad=False`; other buffers are moved to `device`.
        sources: by name. Parameters tied to one another become one tensor; one of their names is enough.
        device: where the module is filled.
        dtype: of the module.
        keep_fp32: parts of names.
        joined: maps a source's name to rows of another parameter.
        fillings: parameters that are filled quantized. They stay meta tensors in the module: the caller inserts the
            finished layers.
        home_of: where a parameter lies; None for `device`.
        on_tensor: called with the name and bytes of each tensor after it is loaded.
        apart: beginnings of names; what begins with one is allocated and filled after everything else, and after what
            begins with the one before.
        after_part: called with each of them when it is filled; it may take the memory away.

    Raises:
        CheckpointError: missing or unexpected names, wrong shapes, or integers where floating-point weights belong (or
            the reverse); raised before anything is allocated.
        ValueError: a weight to be quantized holds inf or NaN.
    """
    aliases = find_aliases(module)
    slots = check_sources(module, sources, joined)
    sources = without_tied(sources, aliases)
    parts: dict[str, list[str]] = {}
    for name in sources:
        parts.setdefault(slots[name].target, []).append(name)
    # ComfyUI runs this in inference mode; tensors made in it cannot be modified outside of it (LoRA).
    with torch.inference_mode(False), torch.no_grad():

        def fill(targets: Collection[str]) -> None:
            destinations: dict[str, Destination] = {}
            for target in targets:
                if target in fillings:
                    fillings[target].allocate()
                    destinations[target] = QuantizedDestination(fillings[target])
                else:
                    final = destination_dtype(target, sources[parts[target][0]].dtype, dtype, keep_fp32)
                    home = device if home_of is None else home_of(target)
                    destinations[target] = PlainDestination(_allocate(module, target, home, final))
            for target in targets:
                destination = destinations.pop(target)
                destination.prepare([sources[name] for name in parts[target]])
                for name in parts[target]:
                    taken = destination.take(slots[name].start, sources[name])
                    if on_tensor is not None:
                        on_tensor(name, taken)

        fill([target for target in parts if not target.startswith(tuple(apart))])
        tie(module, aliases)
        _move_other_buffers(module, device)
        for beginning in apart:
            fill([target for target in parts if target.startswith(beginning)])
            after_part(beginning)


def check_sources(
    module: nn.Module, sources: Mapping[str, RowSource], joined: Mapping[str, tuple[str, slice]] = NOTHING_JOINED
) -> dict[str, Slot]:
    """Where each of `sources` goes in `module`; see `load_weights` for the arguments.

    Raises CheckpointError for missing or unexpected names, wrong shapes, or integers where floating-point weights
    belong (or the reverse).
    """
    aliases = find_aliases(module)
    sources = without_tied(sources, aliases)
    slots = find_slots(module, aliases, joined)
    check_slots(slots, sources)
    return slots


def check_slots(slots: Mapping[str, Slot], sources: Mapping[str, RowSource]) -> None:
    """Raise CheckpointError unless `sources` has each of `slots`, in its shape and kind, and nothing else."""
    _check_names(slots, sources)
    _check_tensors(slots, sources)


def destination_dtype(name: str, stored: torch.dtype, dtype: torch.dtype, keep_fp32: Collection[str]) -> torch.dtype:
    """The dtype that tensor `name`, stored as `stored`, has in a module loaded as `dtype`."""
    if not stored.is_floating_point:
        return stored
    kept = any(part in keep_fp32 for part in name.split("."))
    return torch.float32 if kept else dtype


def without_tied(sources: Mapping[str, RowSource], aliases: Mapping[str, str]) -> dict[str, RowSource]:
    """`sources` with each tied tensor once, under its name in the values of `aliases`; other names unchanged."""
    renamed = {name: source for name, source in sources.items() if name not in aliases}
    for alias, name in aliases.items():
        if alias in sources:
            renamed.setdefault(name, sources[alias])
    return renamed


def _allocate(module: nn.Module, name: str, device: torch.device | str, dtype: torch.dtype) -> torch.Tensor:
    """Allocate the parameter or buffer called `name`."""
    owner, leaf = owner_of(module, name)
    shape = getattr(owner, leaf).shape
    fresh = torch.empty(shape, device=device, dtype=dtype)
    if leaf in owner._parameters:
        owner._parameters[leaf] = nn.Parameter(fresh, requires_grad=False)
    else:
        owner._buffers[leaf] = fresh
    return fresh


def _check_names(slots: Mapping[str, Slot], sources: Mapping[str, RowSource]) -> None:
    missing = [name for name in slots if name not in sources]
    unexpected = [
        name if sources[name].key == name else f"{name} (stored as {sources[name].key})"
        for name in sources
        if name not in slots
    ]
    problems = [f"lacks {_few(missing)}"] * bool(missing) + [f"has unknown {_few(unexpected)}"] * bool(unexpected)
    if problems:
        raise CheckpointError(
            f"The checkpoint {_files(sources)} {' and '.join(problems)}: give the one that belongs "
            "to this model's config."
        )


def _check_tensors(slots: Mapping[str, Slot], sources: Mapping[str, RowSource]) -> None:
    wrong = [
        f"{name} {list(sources[name].shape)} instead of {list(slot.shape)}"
        for name, slot in slots.items()
        if sources[name].shape != slot.shape
    ]
    if wrong:
        raise CheckpointError(
            f"The checkpoint {_files(sources)} has wrong shapes, {_few(wrong)}: give the one that belongs "
            "to this model's config."
        )
    kinds = [
        f"{name} as {source.dtype}"
        for name, source in sources.items()
        if not isinstance(source, QuantizedRows) and source.dtype.is_floating_point != slots[name].floating
    ]
    if kinds:
        raise CheckpointError(
            f"The checkpoint {_files(sources)} stores {_few(kinds)}, which the model cannot use: "
            "give an unquantized checkpoint."
        )


def _few(names: Iterable[str]) -> str:
    listed = list(names)
    shown = ", ".join(listed[:_NAMES_SHOWN])
    return f"{shown} ({len(listed)} in all)" if len(listed) > _NAMES_SHOWN else shown


def _files(sources: Mapping[str, RowSource]) -> str:
    files = sorted({source.file for source in sources.values()})
    if not files:
        return "(no file)"
    return str(files[0]) if len(files) == 1 else f"{files[0].parent} ({len(files)} files)"


def _move_other_buffers(module: nn.Module, device: torch.device | str) -> None:
    """Move the buffers that are not in the checkpoint but computed at construction, such as rotary tables."""
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
