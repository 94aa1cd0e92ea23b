"""What a file is, by its first bytes: what people have under a checkpoint's name is not always one."""

from __future__ import annotations

from enum import Enum, auto
from pathlib import Path

from .checkpoint_files import PICKLED_SUFFIXES, CheckpointError
from .file_bytes import open_file

SAFETENSORS_SUFFIXES = frozenset({".safetensors", ".sft"})
CHECKPOINT_SUFFIXES = SAFETENSORS_SUFFIXES | PICKLED_SUFFIXES

_FIRST_BYTES = 512
_LENGTH_BYTES = 8
_LFS_POINTER = b"version https://git-lfs"
_WEB_PAGE = (b"<!doctype html", b"<html", b"<head", b"<?xml")
_GGUF = b"GGUF"
_ZIP = b"PK\x03\x04"


class FileKind(Enum):
    """How a checkpoint file is read."""

    SAFETENSORS = auto()
    TORCH_ZIP = auto()
    TORCH_LEGACY = auto()


def find_file_kind(path: Path) -> FileKind:
    """How `path` is read: its content decides, and its suffix only where the content does not.

    Raises CheckpointError for a file that is absent, empty, or known to be something else: a web page, a Git LFS
    pointer, a GGUF file.
    """
    if path.suffix.lower() == ".gguf":
        raise _gguf(path)
    with open_file(path) as file:
        first = bytes(file.read(_FIRST_BYTES))
    if not first:
        raise CheckpointError(f"{path} is not a complete checkpoint, it is empty: download it again.")
    if first.startswith(_GGUF):
        raise _gguf(path)
    if first.startswith(_LFS_POINTER):
        raise CheckpointError(
            f"{path} is a Git LFS pointer, some lines of text in the place of the weights: get the file itself with "
            "`git lfs pull`, or download it from its page."
        )
    if first.lstrip(b"\xef\xbb\xbf \t\r\n").lower().startswith(_WEB_PAGE):
        raise CheckpointError(
            f"{path} is a web page and no checkpoint, as a download without a login or an accepted licence gives it: "
            "download the file again with your browser."
        )
    if first.startswith(_ZIP):
        return FileKind.TORCH_ZIP
    # The header of a safetensors file is a JSON object behind its length.
    is_safetensors = first[_LENGTH_BYTES : _LENGTH_BYTES + 1] == b"{"
    if is_safetensors or path.suffix.lower() not in PICKLED_SUFFIXES:
        return FileKind.SAFETENSORS
    return FileKind.TORCH_LEGACY


def _gguf(path: Path) -> CheckpointError:
    return CheckpointError(
        f"{path} is a GGUF file, whose quantized blocks are not read here: take the .safetensors or .pt file of the "
        "same model, and quantize it to FP8 or INT8 with a Quantize Pipeline node; a GGUF text encoder can feed the "
        "sampler's conditioning through its own loader and CLIP Text Encode."
    )
