"""Which saved streams there are, by names alone. No torch: nodes list them when ComfyUI starts."""

from __future__ import annotations

import re
from pathlib import Path

from .running_lock import is_running

NAME = re.compile(r"block_(\d{7,18})\.safetensors", re.ASCII)
# More would be no list that anybody reads.
_MOST = 1000


def names_of_saved(root: Path) -> list[str]:
    """The folders in `root` that hold a snapshot, the one that was written last first; none where `root` is not."""
    try:
        # A name that no page can show is none of the pack's.
        named = (path for path in root.iterdir() if path.name.isprintable())
        folders = [path for path in named if path.is_dir() and not path.is_symlink()]
    except OSError:
        # Nothing was saved yet.
        return []
    newest = [(written, folder.name) for folder in folders if (written := newest_written(folder))]
    return [name for _, name in sorted(newest, reverse=True)[:_MOST]]


def names_at_rest(root: Path) -> list[str]:
    """The same without those that some process runs now."""
    return [name for name in names_of_saved(root) if not is_running(root / name)]


def newest_written(folder: Path) -> float:
    """When the newest snapshot of a folder was written, seconds since 1970; 0 where there is none."""
    try:
        return max((_written(path) for path in folder.iterdir() if NAME.fullmatch(path.name)), default=0.0)
    except OSError:
        # A folder that cannot be read hides only itself.
        return 0.0


def _written(file: Path) -> float:
    try:
        return file.stat().st_mtime
    except OSError:
        # Such as a link to nowhere, which hides no snapshot beside it.
        return 0.0
