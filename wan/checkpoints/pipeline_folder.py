"""Folders of a Wan pipeline in diffusers' layout."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from ...checkpoints.checkpoint_files import CheckpointError

PIPELINE_COMPONENTS = ("transformer", "vae", "text_encoder", "tokenizer", "scheduler")


def check_pipeline_folder(folder: Path, components: Collection[str] = PIPELINE_COMPONENTS) -> None:
    """Raise CheckpointError unless `folder` is a folder with a sub-folder for each of `components`."""
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder: give the folder of a Wan pipeline in diffusers' layout.")
    absent = [name for name in components if not (folder / name).is_dir()]
    if absent:
        raise CheckpointError(
            f"{folder} lacks the sub-folder{'s' * (len(absent) > 1)} {', '.join(absent)}: give the folder "
            f"of a Wan pipeline in diffusers' layout, with {', '.join(components)}."
        )
