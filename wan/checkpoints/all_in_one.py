"""Parts of a pipeline that share one file, and what programs that save such a part alone leave before its names.

ComfyUI's `CheckpointSave` writes `model.diffusion_model.`, `vae.` and `text_encoders.umt5xxl.transformer.`, its
`CLIPSave` nothing; older programs and training code write `first_stage_model.` and `cond_stage_model.`
(ComfyUI 0.33: `comfy/supported_models.py`, `comfy_extras/nodes_model_merging.py`).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from ...checkpoints.checkpoint_files import CheckpointError
from ...checkpoints.checkpoint_reading import read_checkpoint
from ...checkpoints.row_sources import RowSource


@dataclass(frozen=True)
class PartNames:
    """How a part is found among all names of a file.

    Attributes:
        anchors: names, one of which every such part has, whoever named it.
        prefix: matches what may stand before them.
        left_out: names beside the part's that belong to a program and not to the part.
    """

    anchors: frozenset[str]
    prefix: re.Pattern[str]
    left_out: frozenset[str] = frozenset()

    def prefixes(self, names: Collection[str]) -> list[str]:
        """What stands before each part of this kind among `names`."""
        found = {name.removesuffix(anchor) for name in names for anchor in self.anchors if name.endswith(anchor)}
        return sorted(prefix for prefix in found if self.prefix.fullmatch(prefix))


VAE_NAMES = PartNames(
    frozenset({"decoder.head.0.gamma", "decoder.norm_out.gamma"}),
    re.compile(r"(?:(?:vae|first_stage_model|model|module|state_dict|_orig_mod)\.)*"),
)
TEXT_ENCODER_NAMES = PartNames(
    frozenset({"shared.weight", "token_embedding.weight"}),
    re.compile(
        r"(?:(?:text_encoders?|cond_stage_model|umt5xxl|t5xxl|transformer|model|module|state_dict|_orig_mod)\.)*"
    ),
    # A parameter of ComfyUI's class for text encoders, which CLIPSave writes too.
    frozenset({"logit_scale"}),
)
_PARTS = {"vae": VAE_NAMES, "text_encoder": TEXT_ENCODER_NAMES}


def parts_in(file: Path) -> frozenset[str]:
    """Which of "vae" and "text_encoder" the file `file` holds; raises CheckpointError when it cannot be read."""
    names = read_checkpoint(file).tensors.keys()
    return frozenset(part for part, kind in _PARTS.items() if kind.prefixes(names))


def take_part(path: Path, stored: Mapping[str, RowSource], part: PartNames) -> tuple[str, dict[str, RowSource]]:
    """The prefix of a part, and its tensors without it.

    Behind a prefix nothing but the part is taken. Without one, all is taken, so that what does not belong to it is
    reported; so it is, too, when there is no such part.

    Raises:
        CheckpointError: the file holds several.
    """
    prefixes = part.prefixes(stored.keys())
    if len(prefixes) > 1:
        raise CheckpointError(
            f"{path} holds several models of this kind, under {', '.join(map(repr, prefixes))}: give a file with one."
        )
    prefix = prefixes[0] if prefixes else ""
    taken = {name.removeprefix(prefix): tensor for name, tensor in stored.items() if name.startswith(prefix)}
    return prefix, {name: tensor for name, tensor in taken.items() if name not in part.left_out}
