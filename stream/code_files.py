"""The files of a repository that say which code runs, as they were read: what is digested is what is run."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

from ..checkpoints.checkpoint_files import CheckpointError
from ..checkpoints.json_text import parse_json
from .abandoned_work import Check, never_cancelled
from .file_stamp import files_below
from .recipe import is_hub_id

MODULAR_CONFIG = "modular_config.json"
MODULAR_INDEX = "modular_model_index.json"
PIPELINE_INDEX = "model_index.json"
# In the folder itself, and in those of its components, which may lie deeper.
_CONFIG = "config.json"
# Where peft is installed, transformers loads what this names: any other repository, and modules by their name.
ADAPTER_CONFIG = "adapter_config.json"
_ROOT_FILES = frozenset({MODULAR_CONFIG, MODULAR_INDEX, PIPELINE_INDEX, _CONFIG})
_BLOCKS_CLASS = "ModularPipelineBlocks"
MOST_FILES = 500
MOST_BYTES = 16 * 2**20


@dataclass(frozen=True)
class CodeFile:
    """One file as it was read.

    Attributes:
        path: below the repository, with `/`.
        content: all of its bytes.
    """

    path: str
    content: bytes

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the content, 64 hexadecimal digits."""
        return hashlib.sha256(self.content).hexdigest()


@dataclass(frozen=True)
class RepositoryCode:
    """The Python files of a repository or folder, and the configs that say which of their classes are used.

    Attributes:
        place: a hub id, or the absolute path of a folder without links in it.
        commit: of a hub repository, 40 hexadecimal digits; None for a folder.
        files: in the order of their paths.
        reached: False where the hub could not be asked, and this is of an earlier download.
    """

    place: str
    commit: str | None
    files: tuple[CodeFile, ...]
    reached: bool = field(default=True, compare=False)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the paths and digests of all files: another byte, name or file gives another one."""
        listed = json.dumps([[file.path, file.digest] for file in self.files])
        return hashlib.sha256(listed.encode()).hexdigest()

    @property
    def python_files(self) -> dict[str, bytes]:
        """The content of the Python files, by path."""
        return {file.path: file.content for file in self.files if file.path.endswith(".py")}

    @property
    def own_blocks(self) -> tuple[str, str] | None:
        """Module and class of the repository's own blocks; None where it has no code for them.

        Raises:
            CheckpointError: its config names something else.
        """
        return self._own_class(MODULAR_CONFIG, _BLOCKS_CLASS)

    def own_model(self, subfolder: str) -> tuple[str, str] | None:
        """Module and class of the model that the config of a component names; None where it names none of its own.

        Raises:
            CheckpointError: the config names something else than a module beside it and a class.
        """
        named = self._own_class(f"{subfolder}/{_CONFIG}" if subfolder else _CONFIG, "AutoModel")
        return None if named is None else (f"{subfolder.replace('/', '.')}.{named[0]}".lstrip("."), named[1])

    def json(self, path: str) -> dict[str, Any] | None:
        """The object in a config; None where there is no such file.

        Raises:
            CheckpointError: it is no JSON object, or larger or nested deeper than such files are.
        """
        content = next((file.content for file in self.files if file.path == path), None)
        return None if content is None else parse_json(content, f"{path} of {self.place!r}")

    def _own_class(self, config: str, kind: str) -> tuple[str, str] | None:
        own = (self.json(config) or {}).get("auto_map")
        reference = own.get(kind) if isinstance(own, dict) else None
        if reference is None:
            return None
        parts = reference.split(".") if isinstance(reference, str) else []
        if len(parts) != 2 or not all(part.isidentifier() for part in parts):
            raise CheckpointError(
                f"{config} of {self.place!r} names its code {str(reference)[:80]!r}: a module beside the config and a "
                "class are needed, such as 'blocks.MyBlocks'."
            )
        return parts[0], parts[1]


def read_code(model: str, revision: str | None = None, check: Check = never_cancelled) -> RepositoryCode:
    """Read the code of a folder on this disk, or of a hub repository, whose code is downloaded; nothing runs.

    Args:
        model: absolute path of a folder, or a hub id.
        revision: commit, branch or tag of a hub repository.
        check: called while the hub is waited for; raises to give up.

    Raises:
        CheckpointError: it is no folder, there is no such repository, or its code is larger than one can read.
    """
    if is_hub_id(model):
        # Imported here: a folder needs no hub.
        from .hub import fetch_files

        fetched = fetch_files(model, revision, _is_code, most_files=MOST_FILES, most_bytes=MOST_BYTES, check=check)
        return replace(_read_folder(model, fetched.commit, fetched.folder), reached=fetched.reached)
    root = Path(model)
    if not root.is_dir():
        raise CheckpointError(
            f"model {model!r} is not a folder, so it has no blocks of its own: choose the built-in ones."
        )
    real = root.resolve()
    return _read_folder(str(real), None, real)


def _read_folder(place: str, commit: str | None, folder: Path) -> RepositoryCode:
    files, left = [], MOST_BYTES
    for path in sorted(files_below(folder, frozenset({".py", ".json"}))):
        name = path.relative_to(folder).as_posix()
        # Pipes and devices would never end.
        if not path.is_file():
            continue
        if not _is_code(name):
            _refuse_other_case(place, name)
            continue
        with path.open("rb") as file:
            content = file.read(left + 1)
        left -= len(content)
        files.append(CodeFile(name, content))
        if left < 0 or len(files) > MOST_FILES:
            raise CheckpointError(
                f"the code of {place!r} is more than {MOST_FILES} files or {MOST_BYTES // 2**20} MiB: nobody can have "
                "read that; keep only what the pipeline needs in its folder."
            )
    return RepositoryCode(place, commit, tuple(sorted(files, key=lambda file: file.path)))


def _refuse_other_case(place: str, name: str) -> None:
    """Raise CheckpointError for a config that a disk which takes `A` for `a` would open, and this did not read."""
    lower = PurePosixPath(name).name.lower()
    if lower in (_CONFIG, ADAPTER_CONFIG) or name.lower() in _ROOT_FILES:
        raise CheckpointError(f"{name} of {place!r} is written {lower} in every repository: rename it.")


def _is_code(name: str) -> bool:
    path = PurePosixPath(name)
    if path.suffix.lower() == ".py":
        return True
    return name in _ROOT_FILES or path.name in (_CONFIG, ADAPTER_CONFIG)
