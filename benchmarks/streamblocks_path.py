"""Import this before `streamblocks`: the package is then this checkout, installed or not.

The repository root is the package, whatever the folder is called, so it is registered by path.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "streamblocks"


def register_package() -> None:
    """Make `import streamblocks` mean the folder above this one; nothing happens when it is imported already."""
    if PACKAGE in sys.modules:
        return
    spec = importlib.util.spec_from_file_location(PACKAGE, ROOT / "__init__.py", submodule_search_locations=[str(ROOT)])
    if spec is None or spec.loader is None:
        raise ImportError(f"{ROOT / '__init__.py'} is missing: keep benchmarks/ inside the repository.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[PACKAGE] = module
    spec.loader.exec_module(module)


register_package()
