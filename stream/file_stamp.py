"""A stamp of a model's files, so that a replaced checkpoint is loaded again."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Collection, Iterator
from pathlib import Path

from .recipe import is_hub_id

# Weights, configs, tokenizers, and the code of a repository with blocks of its own.
_SUFFIXES = frozenset({".safetensors", ".bin", ".json", ".model", ".txt", ".py"})


def stamp_files(model: str) -> str:
    """A short digest that changes when a file of `model` does: its weights, configs, tokenizer or code.

    Symbolic links are followed, to files and to folders. A dangling link counts as such; loading the model
    reports it.

    Args:
        model: absolute path of a folder or file, or a hub id.

    Returns:
        16 hexadecimal digits; empty for hub ids and absent paths.
    """
    root = Path(model)
    if is_hub_id(model) or not os.path.lexists(root):
        return ""
    files = sorted(files_below(root, _SUFFIXES)) if root.is_dir() else [root]
    return hashlib.sha256("".join(map(_fact, files)).encode()).hexdigest()[:16]


def files_below(root: Path, suffixes: Collection[str]) -> Iterator[Path]:
    """The files below `root` with one of `suffixes`; each folder is visited once, however many links lead to it."""
    entered = {os.path.realpath(root)}
    for folder, names, files in os.walk(root, followlinks=True):
        inside = {name: os.path.realpath(Path(folder, name)) for name in sorted(names)}
        names[:] = [name for name, real in inside.items() if real not in entered]
        entered |= set(inside.values())
        yield from (Path(folder, name) for name in files if Path(name).suffix.lower() in suffixes)


def _fact(file: Path) -> str:
    place = f"{file}:{os.path.realpath(file)}"
    try:
        facts = file.stat()
    except OSError as error:
        # A dangling or circular link, or a file deleted meanwhile.
        return f"{place}:{type(error).__name__};"
    return f"{place}:{facts.st_size}:{facts.st_mtime_ns}:{_content(file)};"


def _content(file: Path) -> str:
    """A digest of code, which may change within its size and its time; other files have megabytes."""
    if file.suffix.lower() != ".py" or not file.is_file():
        return ""
    digest = hashlib.sha256()
    try:
        with file.open("rb") as opened:
            while piece := opened.read(2**20):
                digest.update(piece)
    except OSError as error:
        return type(error).__name__
    return digest.hexdigest()
