"""Where torch.compile keeps its code: a folder that a restart of the system leaves alone.

torch's own choice is the system's folder for temporary files, which many systems empty when they start.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path

import torch

# Read by torch at each use, and set by it at its first; its caches of graphs and Triton's kernels lie inside.
FOLDER_VARIABLE = "TORCHINDUCTOR_CACHE_DIR"


def keep_compiled_code() -> None:
    """Have torch.compile keep its code in `lasting_folder`, from now on and in the whole process.

    A folder that the user has chosen stays, and so does one that something else in this process compiles into
    already. Where `lasting_folder` cannot be written, torch's own choice stays.
    """
    if FOLDER_VARIABLE in os.environ:
        return
    folder = lasting_folder(os.environ, sys.platform)
    if _is_writable(folder):
        os.environ[FOLDER_VARIABLE] = str(folder)


def lasting_folder(environment: Mapping[str, str], platform: str) -> Path:
    """The folder for this version of torch inside the user's folder for caches.

    Args:
        environment: of the process.
        platform: as `sys.platform`.
    """
    home = Path.home()
    if platform == "win32":
        caches = Path(environment.get("LOCALAPPDATA") or home / "AppData" / "Local")
    elif platform == "darwin":
        caches = home / "Library" / "Caches"
    else:
        caches = Path(environment.get("XDG_CACHE_HOME") or home / ".cache")
    return caches / "streamblocks" / f"torch-{torch.__version__}"


def _is_writable(folder: Path) -> bool:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return False
    return os.access(folder, os.W_OK)
