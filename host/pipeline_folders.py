"""Folders in diffusers' layout below a root, by the names that nodes list; no weights are read."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

logger = logging.getLogger(__name__)

# `models/diffusers/maker/model/version` is found, and what lies deeper is not.
MAX_DEPTH = 3
_TRANSFORMER = "transformer"
_OTHER_COMPONENTS = frozenset({"vae", "text_encoder", "tokenizer"})
# A modular repository may name a transformer elsewhere.
_MODULAR_MARKS = frozenset({"modular_model_index.json", "modular_config.json"})
_INDEX = "model_index.json"
# How huggingface_hub names a repository in a cache: `models--owner--name`.
_CACHE_PREFIX = "models--"
_LONGEST_COMMIT = 200


@dataclass(frozen=True)
class PipelineFolder:
    """A folder that holds components of a pipeline.

    Attributes:
        path: of the folder; in a hub cache, of the snapshot.
        has_model: it has a transformer, or is a modular repository, rather than VAE, text encoder or tokenizer only.
    """

    path: Path
    has_model: bool


@dataclass(frozen=True)
class _Listing:
    """The names in one folder; links count as what they lead to, and broken ones as files."""

    folders: frozenset[str] = frozenset()
    files: frozenset[str] = frozenset()

    @property
    def has_model(self) -> bool:
        return _TRANSFORMER in self.folders or bool(_MODULAR_MARKS & self.files)

    @property
    def has_components(self) -> bool:
        return self.has_model or bool(_OTHER_COMPONENTS & self.folders)


def find_pipeline_folders(root: Path) -> dict[str, PipelineFolder]:
    """The pipeline folders below `root` by their names, which are relative and written with "/".

    Links are followed, but not back to a folder above. A repository in a hub cache (`models--owner--name`) is named
    `owner/name`, and its snapshot is the one that `refs/main` names, else the newest. Of two with one name, a plain
    folder comes before a hub cache. A folder that cannot be read hides what is in it, and a warning names it once.

    Args:
        root: such as `models/diffusers`; it need not exist, and is not itself taken for a pipeline.
    """
    found: dict[str, PipelineFolder] = {}
    for name, folder in _search(root, (), 0, frozenset()):
        found.setdefault("/".join(name), folder)
    return found


def _search(
    folder: Path, name: tuple[str, ...], depth: int, above: frozenset[tuple[int, int]]
) -> Iterator[tuple[tuple[str, ...], PipelineFolder]]:
    """`folder`, when it holds components, and those in it, down to `MAX_DEPTH`; `above` are the folders it lies in."""
    listing, identity = _read_folder(folder)
    if identity is None or identity in above:
        return
    if depth and listing.has_components:
        yield name, PipelineFolder(folder, listing.has_model)
    if depth == MAX_DEPTH or (depth and (listing.has_model or _INDEX in listing.files)):
        return
    # Next to components only, other pipelines may lie: a folder that somebody called `vae` makes no pipeline.
    skipped = _OTHER_COMPONENTS if depth else frozenset[str]()
    for child in sorted(listing.folders - skipped, key=lambda each: (each.startswith(_CACHE_PREFIX), each)):
        if child.startswith(_CACHE_PREFIX):
            yield from _search_cache(folder / child, name, depth + 1, above | {identity})
        elif not child.startswith("."):
            yield from _search(folder / child, (*name, child), depth + 1, above | {identity})


def _search_cache(
    cache: Path, name: tuple[str, ...], depth: int, above: frozenset[tuple[int, int]]
) -> Iterator[tuple[tuple[str, ...], PipelineFolder]]:
    """The pipeline folders of one repository in a hub cache, from the first snapshot that has any."""
    repository = tuple(cache.name.removeprefix(_CACHE_PREFIX).split("--"))
    for snapshot in _snapshots(cache):
        found = list(_search(snapshot, (*name, *repository), depth, above))
        if found:
            yield from found
            return


def _snapshots(cache: Path) -> list[Path]:
    """The snapshots of a repository: the one of its main branch, then the newest first."""
    listing, _ = _read_folder(cache / "snapshots")
    try:
        main = _read_commit(cache / "refs" / "main")
    except (OSError, UnicodeDecodeError):
        main = ""
    snapshots = [cache / "snapshots" / commit for commit in sorted(listing.folders)]
    return sorted(snapshots, key=lambda snapshot: (snapshot.name != main, -_modified(snapshot)))


def _read_commit(file: Path) -> str:
    """The commit in a reference of the hub's cache; empty for what is no regular file, such as a pipe."""
    if not file.is_file():
        return ""
    with file.open("rb") as opened:
        return opened.read(_LONGEST_COMMIT).decode("utf-8").strip()


def _modified(folder: Path) -> float:
    try:
        return folder.stat().st_mtime
    except OSError:
        return 0.0


def _read_folder(folder: Path) -> tuple[_Listing, tuple[int, int] | None]:
    """What is in a folder, and which folder it is, whatever links lead to it; nothing and None if it is unreadable."""
    folders: set[str] = set()
    files: set[str] = set()
    try:
        facts = folder.stat()
        with os.scandir(folder) as entries:
            for entry in entries:
                (folders if _leads_to_folder(entry) else files).add(entry.name)
    except FileNotFoundError:
        return _Listing(), None
    except OSError as error:
        _warn_unreadable(folder, str(error))
        return _Listing(), None
    return _Listing(frozenset(folders), frozenset(files)), (facts.st_dev, facts.st_ino)


def _leads_to_folder(entry: os.DirEntry[str]) -> bool:
    try:
        if entry.is_dir():
            return True
        if entry.is_symlink():
            Path(entry.path).stat()
    except OSError as error:
        # A dangling link, one to itself, or one into a folder that may not be entered.
        _warn_unreadable(Path(entry.path), str(error))
    return False


@lru_cache(maxsize=256)
def _warn_unreadable(place: Path, reason: str) -> None:
    # ComfyUI asks for the lists whenever a page is opened: the cache keeps this to one line a place.
    logger.warning("%s is left out of the list of models, because it cannot be read: %s", place, reason)
