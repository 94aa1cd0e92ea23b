"""Convert a checkpoint: `python -m streamblocks.tools.convert MODEL FILE.safetensors [--trained]`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from ..stream.convert import convert_checkpoint

_PERCENT_STEP = 10


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line, write the file, say where it is; 1 when it cannot be done."""
    parser = argparse.ArgumentParser(
        description="Write the transformer of a checkpoint as one safetensors file with plain names."
    )
    parser.add_argument("model", type=Path, help="a .pt, .pth, .bin, .ckpt or .safetensors file, or a pipeline folder")
    parser.add_argument("file", type=Path, help="the .safetensors file to write; it must not be there yet")
    parser.add_argument(
        "--trained",
        action="store_true",
        help="of a training checkpoint with both, take the trained weights instead of their moving average",
    )
    options = parser.parse_args(arguments)
    try:
        convert_checkpoint(options.model, options.file, averaged=not options.trained, on_progress=_Percents().show)
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    print(f"{options.file}: {options.file.stat().st_size / 1e6:.2f} MB")
    return 0


class _Percents:
    """Prints how much is written, in steps."""

    def __init__(self) -> None:
        self._shown = 0

    def show(self, done: int, total: int) -> None:
        percent = 100 * done // max(total, 1) // _PERCENT_STEP * _PERCENT_STEP
        if percent > self._shown:
            self._shown = percent
            print(f"{percent} % of {total / 1e9:.2f} GB", flush=True)


if __name__ == "__main__":
    sys.exit(main())
