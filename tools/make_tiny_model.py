"""Write the tiny Wan pipeline: `python -m streamblocks.tools.make_tiny_model FOLDER [--seed N]`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from ..wan.tiny_model import write_tiny_model


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line, write the folder, print where it is and how large."""
    parser = argparse.ArgumentParser(description="Write a tiny Wan pipeline with seeded random weights.")
    parser.add_argument("folder", type=Path, help="the folder to write into; it is made if absent")
    parser.add_argument("--seed", type=int, default=0, help="the same seed writes the same bytes")
    options = parser.parse_args(arguments)
    folder = write_tiny_model(options.folder, seed=options.seed)
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    print(f"{folder}: {size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
