"""Recipe to pipeline: the one materialised pipeline of the process."""

from __future__ import annotations

import threading
from pathlib import Path

import torch

from ..checkpoints.checkpoint_files import CheckpointError, refuse_pickled
from ..families.model_family import ComponentOptions
from ..memory.cleanup import release_cached_memory
from .component_store import ComponentStore
from .device_choice import check_attention_backend, check_compile, choose_device, choose_dtype, choose_vae_dtype
from .foreign import load_foreign_pipeline
from .hub import BUILT_IN_COMPONENTS, fetch_pipeline_folder
from .known_families import recognise_family
from .pipelines import BuiltInPipeline, ForeignPipeline, StreamPipeline, attention_choice
from .recipe import BUILT_IN_BLOCKS, Recipe, is_hub_id
from .residency import PlainResidency, Residency

SHARED_COMPONENTS = ("vae", "text_encoder", "tokenizer")

_lock = threading.Lock()
_current: StreamPipeline | None = None


def materialise(
    recipe: Recipe, *, residency: Residency | None = None, default_device: torch.device | None = None
) -> StreamPipeline:
    """The pipeline of a recipe: the one already there when the recipe is equal, else a new one.

    Only one pipeline is materialised at a time. The old one is dropped *before* the new one loads, so that two
    models never have to fit.

    Args:
        recipe: what to make.
        residency: who decides what is on the device; used when a pipeline is made.
        default_device: what the recipe's device "auto" means.

    Raises:
        CheckpointError: the files are missing, damaged, pickled or do not fit.
        ValueError: this machine has not got the device, dtype or attention backend.
    """
    global _current
    with _lock:
        if _current is not None and _current.recipe == recipe:
            return _current
        _release_locked()
        _current = _make(recipe, residency or PlainResidency(), default_device or torch.device("cpu"))
        return _current


def materialised_device() -> torch.device | None:
    """The device of the materialised pipeline; None when there is none."""
    with _lock:
        return None if _current is None else _current.device


def release_materialised() -> None:
    """Drop the materialised pipeline, if there is one, and give its memory back."""
    with _lock:
        _release_locked()


def _release_locked() -> None:
    global _current
    if _current is None:
        return
    pipeline, _current = _current, None
    pipeline.release()
    release_cached_memory(pipeline.device)


def _make(recipe: Recipe, residency: Residency, default_device: torch.device) -> StreamPipeline:
    device = choose_device(recipe.device, default_device)
    dtype = choose_dtype(recipe.dtype, device)
    vae_dtype = choose_vae_dtype(dtype, device)
    check_attention_backend(recipe.attention_backend, device)
    check_compile(recipe.compile, device)
    if recipe.blocks != BUILT_IN_BLOCKS:
        pipe = load_foreign_pipeline(recipe, dtype=dtype, vae_dtype=vae_dtype)
        return ForeignPipeline(recipe, pipe, device, residency)
    model = _local_model(recipe)
    parts = _local_parts(recipe, model)
    family = recognise_family(model)
    options = ComponentOptions(dtype, vae_dtype, recipe.quantization, attention_choice(recipe))
    store = ComponentStore(family.components(model, parts, options), device, residency)
    tokenizer = family.load_tokenizer(parts)
    return BuiltInPipeline(recipe, family=family, store=store, tokenizer=tokenizer, device=device, residency=residency)


def _local_model(recipe: Recipe) -> Path:
    """The folder or file of the transformer on this disk, fetched when the user named a hub repository."""
    if recipe.is_hub_id:
        # With components from elsewhere, gigabytes of VAE and text encoder would be fetched for nothing.
        wanted = BUILT_IN_COMPONENTS if recipe.components is None else ("transformer",)
        return fetch_pipeline_folder(recipe.model, recipe.revision, wanted)
    model = Path(recipe.model)
    refuse_pickled(model)
    if not model.exists():
        raise CheckpointError(
            f"model {recipe.model!r} is not there: choose a folder in models/diffusers, a .safetensors file in "
            "models/diffusion_models, or give a hub id."
        )
    return model


def _local_parts(recipe: Recipe, model: Path) -> Path:
    """The folder of VAE, text encoder and tokenizer."""
    if recipe.components is not None:
        if is_hub_id(recipe.components):
            return fetch_pipeline_folder(recipe.components, None, SHARED_COMPONENTS)
        return Path(recipe.components)
    if model.is_file():
        raise CheckpointError(
            f"model {recipe.model!r} holds only the transformer: choose a diffusers folder under 'components' for "
            "VAE, text encoder and tokenizer."
        )
    return model
