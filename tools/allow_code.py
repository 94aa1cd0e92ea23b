"""Show the Python code that a model brings, and ask whether it may run on this machine.

python tools/allow_code.py models/diffusers/krea
python tools/allow_code.py owner/name --commit <40 digits>

A model whose code is not allowed is refused with the whole command line. The pack's folder may have any name, so this
file makes a package of it first.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path

_NAME = "streamblocks_pack"


def main() -> int:
    """Run as a script."""
    # Not resolved: the pack may be linked into ComfyUI's folder of packs.
    root = Path(__file__).absolute().parent.parent
    spec = importlib.util.spec_from_file_location(_NAME, root / "__init__.py", submodule_search_locations=[str(root)])
    if spec is None:
        return 1
    sys.modules[_NAME] = importlib.util.module_from_spec(spec)
    status: int = importlib.import_module(f"{_NAME}.tools.code_question").main()
    return status


if __name__ == "__main__":
    sys.exit(main())
