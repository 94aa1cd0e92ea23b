"""Write the transformer of any readable checkpoint as one plain safetensors file, which loads fast."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from ..checkpoints.tensor_writing import write_tensors
from .full_disk import explaining_full_disk
from .known_families import recognise_family


def convert_checkpoint(
    model: Path, path: Path, *, averaged: bool = True, on_progress: Callable[[int, int], None]
) -> Path:
    """Write the transformer of `model` to `path`, some rows at a time; nothing of it is changed or kept in memory.

    Args:
        model: a pipeline folder or a single file, safetensors or PyTorch's.
        path: a `.safetensors` file that is not there yet; no half file is ever left.
        averaged: of a training checkpoint with both, take the exponential moving average of the weights.
        on_progress: called with the bytes written and all bytes after each tensor; what it raises (cancel) stops it.

    Raises:
        CheckpointError: `model` holds no transformer of a known family, or is damaged.
        ValueError: `path` has another suffix, or is there.
        OSError: the disk is full, or `path` cannot be written.
    """
    if path.suffix != ".safetensors":
        raise ValueError(f"{path} has the suffix {path.suffix!r}: give the new file a name that ends in .safetensors.")
    if path.exists():
        raise ValueError(f"{path} is there already, and is not replaced: give the new file another name, or delete it.")
    planned = recognise_family(model).plan_plain_checkpoint(model, averaged=averaged)
    total, written = planned.nbytes, 0

    def on_tensor(_: str, nbytes: int) -> None:
        nonlocal written
        written += nbytes
        on_progress(written, total)

    path.parent.mkdir(parents=True, exist_ok=True)
    with explaining_full_disk(path.parent, lambda: "nothing was written"):
        write_tensors(path, planned.tensors, planned.metadata, on_tensor)
    return path
