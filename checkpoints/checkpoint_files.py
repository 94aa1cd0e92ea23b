"""Which files of a folder hold a component."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from .checkpoint_error import CheckpointError as CheckpointError
from .checkpoint_error import shown
from .json_text import read_json

PICKLED_SUFFIXES = frozenset({".bin", ".pt", ".pth", ".ckpt", ".pkl"})
# Of a component's files, the first kind that is there counts.
_SUFFIXES = (".safetensors", ".bin")
_INDEX = ".index.json"
# What diffusers and transformers call a component's main files; other names are variants (`fp16`, `ema`).
_MAIN_STEMS = ("diffusion_pytorch_model", "model", "pytorch_model")
_LONGEST_NAME = 255
_SHARD = re.compile(r"-\d{5}-of-\d{5}$")


def list_component_files(folder: Path) -> list[Path]:
    """The weights of a component folder: the shards its index names, or its single file.

    PyTorch's files count where there is no safetensors file.

    Raises CheckpointError for an absent or empty folder, a missing shard, shards without an index, or several
    candidate files.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder: give a component folder of a diffusers pipeline.")
    for suffix in _SUFFIXES:
        indexes = sorted(folder.glob(f"*{suffix}{_INDEX}"))
        if indexes:
            return _shards(_main_file(indexes, f"{suffix}{_INDEX}"))
        files = sorted(folder.glob(f"*{suffix}"))
        if files:
            return [_single_file(files, suffix)]
    raise CheckpointError(f"{folder} holds no {' or '.join(_SUFFIXES)} file: download the component again.")


def _main_file(files: Sequence[Path], suffix: str) -> Path:
    named = [path for path in files if path.name.removesuffix(suffix) in _MAIN_STEMS]
    candidates = named or list(files)
    if len(candidates) > 1:
        names = ", ".join(path.name for path in candidates)
        raise CheckpointError(f"{files[0].parent} holds several checkpoints ({names}): keep only the one to load.")
    return candidates[0]


def _single_file(files: Sequence[Path], suffix: str) -> Path:
    if any(_SHARD.search(path.stem) for path in files):
        raise CheckpointError(
            f"{files[0].parent} holds shards such as {files[0].name} but no *{suffix}{_INDEX}: "
            "download the index file too."
        )
    return _main_file(files, suffix)


def _shards(index: Path) -> list[Path]:
    """The files an index names, which must be in its folder."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index} has no weight_map: download it again.")
    files = []
    wrong = [name for name in weight_map.values() if not isinstance(name, str) or not _is_file_name(name)]
    if wrong:
        raise CheckpointError(f"{index} names {shown(wrong[0])}, but shards must be in its folder: download it again.")
    for name in sorted(set(weight_map.values())):
        if not (index.parent / name).is_file():
            raise CheckpointError(f"{index.parent} lacks the shard {name}, which {index.name} names: download it.")
        files.append(index.parent / name)
    return files


def _is_file_name(name: str) -> bool:
    return Path(name).name == name and name.isprintable() and len(name) <= _LONGEST_NAME
