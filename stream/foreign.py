"""Load a diffusers modular repository that brings its own blocks."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from diffusers.modular_pipelines import ModularPipeline

from ..wan.checkpoint_files import CheckpointError
from .recipe import Recipe

_MODEL_COMPONENTS = ("transformer", "vae", "text_encoder", "text_encoder_2", "image_encoder")


def load_foreign_pipeline(recipe: Recipe, *, dtype: torch.dtype, vae_dtype: torch.dtype) -> ModularPipeline:
    """Blocks from the repository's code (if the user ticked it), weights from safetensors only.

    Raises:
        CheckpointError: remote code is needed and was not allowed, or a component did not load.
    """
    _refuse_unasked_code(recipe)
    try:
        pipe = ModularPipeline.from_pretrained(
            recipe.model, trust_remote_code=recipe.trust_remote_code, revision=recipe.revision
        )
    except (OSError, ValueError, ImportError) as error:
        raise CheckpointError(
            f"model {recipe.model!r} is no diffusers modular repository that can be used here: {error}"
        ) from error
    pipe.load_components(
        dtype={"default": dtype, "vae": vae_dtype},
        # Never a pickled file, also where a repository has both.
        use_safetensors=dict.fromkeys(_MODEL_COMPONENTS, True),
        **({"trust_remote_code": True} if recipe.trust_remote_code else {}),
    )
    missing = [name for name in pipe.pretrained_component_names if getattr(pipe, name, None) is None]
    if missing:
        raise CheckpointError(
            f"model {recipe.model!r} did not bring {', '.join(missing)}: its files are incomplete or not "
            "safetensors; the log above says why."
        )
    return pipe


def _refuse_unasked_code(recipe: Recipe) -> None:
    """Before diffusers looks: its own refusal may ask on a terminal that a server has not got."""
    config = Path(recipe.model) / "modular_config.json"
    if recipe.trust_remote_code or not config.is_file():
        return
    if "auto_map" in json.loads(config.read_text(encoding="utf-8")):
        raise CheckpointError(
            f"model {recipe.model!r} brings its own Python code, which is not run unasked: read it, then tick "
            "'trust_remote_code', or choose the built-in blocks."
        )
