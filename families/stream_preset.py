"""The settings that a model's makers use, and where they say so. Light: nodes read it when ComfyUI starts."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..checkpoints.checkpoint_error import shown, shown_word
from .kv_policies import KEEP_KEYS
from .step_list import StepList

# What a model's own file may change; the settings check the values.
IN_FILES = (
    "name",
    "width",
    "height",
    "fps",
    "steps",
    "shift",
    "kv_policy",
    "context_frames",
    "frames_per_block",
    "sink_frames",
    "attention_bias",
    "on_prompt_change",
)


# The settings say what each may be; no number that a stream computes with is larger, and NaN is none.
_LARGEST = 1e6
_LONGEST_WORD = 100


@dataclass(frozen=True)
class StreamPreset:
    """How the makers of one model stream it.

    Attributes:
        name: shown to users.
        width: pixels.
        height: pixels.
        fps: pictures a second.
        steps: denoising passes per block.
        shift: flow shift of the schedule.
        kv_policy: how the past is remembered.
        context_frames: latent frames of the past that a block sees: the makers' window without the block itself.
        frames_per_block: latent frames per block.
        sink_frames: of the context, how many stay the stream's first ones.
        attention_bias: weight on keys of past frames other than the first; 1 is off.
        timesteps: of each block; None spaces `steps` evenly.
        first_block_timesteps: of the first block, where it has others.
        on_prompt_change: what a new prompt does to the keys of the past, one of `PROMPT_CHANGES`.
        files: patterns of file or folder names that the model is published under, in lower case, `_` for `-`.
        source: where the values are published.
        note: what differs from the makers' way here; empty for nothing.
    """

    name: str
    width: int
    height: int
    fps: float
    steps: int
    shift: float
    kv_policy: str
    context_frames: int
    frames_per_block: int
    sink_frames: int = 0
    attention_bias: float = 1.0
    timesteps: StepList | None = None
    first_block_timesteps: StepList | None = None
    on_prompt_change: str = KEEP_KEYS
    files: tuple[str, ...] = ()
    source: str = ""
    note: str = ""

    def is_published_as(self, path: Path) -> bool:
        """Whether the name of `path`, or of one of the two folders around it, is one of the model's."""
        names = [part.lower().replace("-", "_") for part in path.parts[-3:]]
        return any(fnmatch.fnmatch("/".join(names), f"*{pattern}*") for pattern in self.files)

    def changed(self, values: Mapping[str, Any], place: str) -> StreamPreset:
        """The preset with some values from a file.

        Args:
            values: by attribute.
            place: of the file, for the message.

        Raises:
            ValueError: a name or a value is not possible.
        """
        for name, value in values.items():
            known = getattr(self, name) if name in IN_FILES else None
            if isinstance(value, (int, float)) and not -_LARGEST <= value <= _LARGEST:
                raise ValueError(
                    f"{place} has {shown_word(name)} = {shown(value)}: give a number up to {_LARGEST:.0f}."
                )
            if isinstance(known, float) and type(value) is int:
                continue
            if isinstance(value, str) and not (value.isprintable() and len(value) <= _LONGEST_WORD):
                raise ValueError(
                    f"{place} has {shown_word(name)} = {shown(value)}: write up to {_LONGEST_WORD} printable letters."
                )
            if name not in IN_FILES or type(value) is not type(known):
                raise ValueError(
                    f"{place} has {shown_word(name)} = {shown(value)}: it may have {', '.join(IN_FILES)}, each of its "
                    "kind."
                )
        return replace(self, **values)
