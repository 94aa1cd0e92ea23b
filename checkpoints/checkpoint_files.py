"""Which safetensors files hold a component, and what their headers say. No tensor data is read here."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

PICKLED_SUFFIXES = frozenset({".bin", ".pt", ".pth", ".ckpt", ".pkl"})
_INDEX_SUFFIX = ".safetensors.index.json"
# What diffusers and transformers call a component's main files; other names are variants (`fp16`, `ema`).
_MAIN_STEMS = ("diffusion_pytorch_model", "model")
_SHARD = re.compile(r"-\d{5}-of-\d{5}$")
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


class CheckpointError(ValueError):
    """A checkpoint cannot be used; the message names the file or key and says what to do."""


@dataclass(frozen=True)
class TensorSource:
    """Where a tensor is stored: a safetensors file and the key inside it."""

    file: Path
    key: str


@dataclass(frozen=True)
class TensorHeader:
    """What a file's header says about a tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def elements(self) -> int:
        """How many numbers the tensor holds."""
        return torch.Size(self.shape).numel()


def refuse_pickled(path: Path) -> None:
    """Raise CheckpointError when `path` has the suffix of a pickled checkpoint, which could run code."""
    if path.suffix.lower() in PICKLED_SUFFIXES:
        raise CheckpointError(
            f"{path} is a pickled checkpoint, and loading one can run any code, so only .safetensors files "
            "are taken: convert it on a machine you trust with "
            "`safetensors.torch.save_file(torch.load(path, weights_only=True), new_path)`."
        )


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; raises CheckpointError when the file is absent or not a JSON object."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON ({error}): download it again.") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds no JSON object: download it again.")
    return content


def list_component_files(folder: Path) -> list[Path]:
    """The safetensors files of a component folder: the shards its index names, or its single file.

    Raises CheckpointError for an absent or empty folder, a missing shard, shards without an index, several
    candidate files, or a folder that holds pickled weights only.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder: give a component folder of a diffusers pipeline.")
    indexes = sorted(folder.glob(f"*{_INDEX_SUFFIX}"))
    if indexes:
        index = _main_file(indexes, _INDEX_SUFFIX)
        return _shards(index)
    files = sorted(folder.glob("*.safetensors"))
    if files:
        return [_single_file(files)]
    for path in sorted(folder.iterdir()):
        refuse_pickled(path)
    raise CheckpointError(f"{folder} holds no .safetensors file: download the component again.")


def _main_file(files: Sequence[Path], suffix: str) -> Path:
    named = [path for path in files if path.name.removesuffix(suffix) in _MAIN_STEMS]
    candidates = named or list(files)
    if len(candidates) > 1:
        names = ", ".join(path.name for path in candidates)
        raise CheckpointError(
            f"{files[0].parent} holds several checkpoints ({names}): keep the one that is to be loaded."
        )
    return candidates[0]


def _single_file(files: Sequence[Path]) -> Path:
    if any(_SHARD.search(path.stem) for path in files):
        raise CheckpointError(
            f"{files[0].parent} holds shards such as {files[0].name} but no *{_INDEX_SUFFIX}: "
            "download the index file too."
        )
    return _main_file(files, ".safetensors")


def _shards(index: Path) -> list[Path]:
    """The files an index names, which must lie beside it."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index} has no weight_map: download it again.")
    files = []
    for name in sorted({str(value) for value in weight_map.values()}):
        if Path(name).name != name:
            raise CheckpointError(f"{index} names {name!r}, but a shard must lie beside its index.")
        refuse_pickled(Path(name))
        if not (index.parent / name).is_file():
            raise CheckpointError(f"{index.parent} lacks the shard {name}, which {index.name} names: get it.")
        files.append(index.parent / name)
    return files


@contextmanager
def open_checkpoint(file: Path, device: torch.device | str = "cpu") -> Iterator[Any]:
    """`safe_open`, with CheckpointError that names the file when it is absent, truncated or corrupt."""
    refuse_pickled(file)
    try:
        handle = safe_open(file, framework="pt", device=str(device))
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file} is not a complete safetensors file ({error}): download it again.") from error
    with handle as opened:
        yield opened


def index_tensors(files: Iterable[Path]) -> dict[str, TensorSource]:
    """Every key in `files` and where it is stored, from the headers only.

    Raises CheckpointError for a truncated or corrupt file and for a key that two files hold.
    """
    sources: dict[str, TensorSource] = {}
    for file in files:
        with open_checkpoint(file) as opened:
            for key in list(opened.keys()):
                if key in sources:
                    raise CheckpointError(
                        f"{key} is in both {sources[key].file.name} and {file.name} of {file.parent}: keep "
                        "one of the two files."
                    )
                sources[key] = TensorSource(file, key)
    return sources


def read_headers(sources: Mapping[str, TensorSource]) -> dict[str, TensorHeader]:
    """Shape and dtype of every source, from the headers only, under the mapping's names.

    Raises CheckpointError for an unreadable file, an absent key, or a dtype that torch does not have.
    """
    headers: dict[str, TensorHeader] = {}
    for file, names in by_file(sources).items():
        with open_checkpoint(file) as opened:
            present = set(opened.keys())
            for name in names:
                headers[name] = _header(opened, file, sources[name].key, present)
    return headers


def by_file(sources: Mapping[str, TensorSource]) -> dict[Path, list[str]]:
    """The names in `sources` grouped by file, so that each file is opened once."""
    groups: dict[Path, list[str]] = {}
    for name, source in sources.items():
        groups.setdefault(source.file, []).append(name)
    return groups


def _header(opened: Any, file: Path, key: str, present: set[str]) -> TensorHeader:  # noqa: ANN401
    if key not in present:
        raise CheckpointError(f"{file} has no tensor {key}: give the file that it was indexed from.")
    part = opened.get_slice(key)
    dtype = _DTYPES.get(part.get_dtype())
    if dtype is None:
        raise CheckpointError(
            f"{key} in {file} has the dtype {part.get_dtype()}, allowed are {', '.join(_DTYPES)}: give an "
            "unquantized checkpoint."
        )
    return TensorHeader(tuple(part.get_shape()), dtype)
