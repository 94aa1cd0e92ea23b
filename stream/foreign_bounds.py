"""Numbers in a stranger's configs, bounded before a library builds what they say: layers without end, tables of GBs.

The libraries build a model of any class without memory for its weights, but they do build each layer, and fill tables
of positions and timesteps. What numbers mean is known by their names only, as both libraries use them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..checkpoints.checkpoint_error import CheckpointError, shown
from ..checkpoints.safetensors_reading import read_header

# What is built one by one; the deepest published models have 128.
_LAYERS, MOST_LAYERS = re.compile(r"layer|block|depth|stage|expert", re.IGNORECASE), 1000
# Widths and rates have such words in their names, too.
_WIDTHS = re.compile(r"channel|dim|size|width|rate|norm|scale|token", re.IGNORECASE)
# Of what tables have a row for each.
_ROWS = (
    (re.compile(r"sample(?!.*rate)|image_size|pos_embed|grid|patch", re.IGNORECASE), 4096),
    (re.compile(r"timesteps|seq_len", re.IGNORECASE), 65_536),
)
# Vocabularies, and positions that no table is made of.
_MOST = 2**24


def check_config_bounds(place: str, config: Mapping[str, Any], layers: int = MOST_LAYERS) -> None:
    """Raise CheckpointError, one sentence, for a number that no model has.

    Args:
        place: of the config, for the message.
        config: of a component.
        layers: most layers that it can have.
    """
    for name, number in _numbers(config):
        rows = next((most for kind, most in _ROWS if kind.search(name)), _MOST)
        most = rows if _WIDTHS.search(name) else layers if _LAYERS.search(name) else rows
        # Numbers with a point are no sizes, but tables are made as long as they say, too.
        if abs(number) > most and not (isinstance(number, float) and most == _MOST):
            raise CheckpointError(
                f"{place} has {shown(name)} {shown(number)}, and up to {most} are built: download it again, or choose "
                "another model."
            )


def count_tensors(folder: Path) -> int | None:
    """How many tensors a component's safetensors files have; None where there are none.

    Raises CheckpointError for a file that cannot be read.
    """
    files = sorted(folder.glob("*.safetensors"))
    return sum(len(read_header(file).tensors) for file in files) if files else None


def _numbers(config: Mapping[str, Any]) -> Iterator[tuple[str, int | float]]:
    """Each number with the name that it, or the list around it, has."""
    waiting: list[tuple[str, Any]] = list(config.items())
    while waiting:
        name, value = waiting.pop()
        if isinstance(value, dict):
            # Of names such as "0", the one around says more.
            waiting += [(key if key[:1].isalpha() else name, below) for key, below in value.items()]
        elif isinstance(value, list):
            waiting += [(name, below) for below in value]
        elif type(value) in (int, float):
            yield name, value
