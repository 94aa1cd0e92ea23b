"""How many layers a model has: counted in its tensors' names, whatever numbers are in these or in a config."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from .checkpoint_error import CheckpointError


def count_layers(path: Path, names: Iterable[str], beginning: str) -> int:
    """How many layers there are, numbered from 0, among `names` such as `blocks.0.attn.weight`.

    Args:
        path: of the file, for messages.
        names: of tensors.
        beginning: of a layer's names, before its number: `blocks.`.

    Raises:
        CheckpointError: a number is left out.
    """
    pattern = re.compile(re.escape(beginning) + r"(0|[1-9][0-9]*)\.")
    written = {match[1] for match in map(pattern.match, names) if match}
    # A set of numbers as they are written: each may have thousands of digits.
    absent = next((number for number in range(len(written)) if str(number) not in written), None)
    if absent is not None:
        last = max(written, key=lambda digits: (len(digits), digits))
        raise CheckpointError(
            f"{path} lacks the layer {absent}, {beginning}{absent}, and has {beginning}{last[:12]}: give the complete "
            "file."
        )
    return len(written)


def check_layer_count(path: Path, name: str, configured: int, names: Iterable[str], beginning: str) -> None:
    """Raise CheckpointError unless a config's number of layers, called `name` there, is that of the tensors' names."""
    found = count_layers(path, names, beginning)
    if found != configured:
        raise CheckpointError(
            f"{path} has {name} {configured} in its config and {found} layers in its weights: give the files that "
            "belong together, or download them again."
        )
