"""Recipe to pipeline: the one materialised pipeline of the process."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from ..checkpoints.checkpoint_files import CheckpointError, refuse_pickled
from ..families.model_family import ComponentOptions
from ..memory.cleanup import release_cached_memory
from .component_store import ComponentStore, LoadCallback, ignore_load
from .device_choice import check_attention_backend, check_compile, choose_device, choose_dtype, choose_vae_dtype
from .foreign import load_foreign_pipeline
from .hub import BUILT_IN_COMPONENTS, find_cached_folder, find_repository
from .known_families import recognise_family
from .pipelines import BuiltInPipeline, ForeignPipeline, StreamPipeline, attention_choice
from .recipe import BUILT_IN_BLOCKS, Recipe, is_hub_id
from .residency import PlainResidency, Residency

# Hub id, revision and components to the folder they are in.
Fetch = Callable[[str, str | None, Sequence[str]], Path]

SHARED_COMPONENTS = ("vae", "text_encoder", "tokenizer")

_lock = threading.Lock()
_current: StreamPipeline | None = None


def materialise(
    recipe: Recipe,
    *,
    residency: Residency | None = None,
    default_device: torch.device | None = None,
    on_load: LoadCallback = ignore_load,
) -> StreamPipeline:
    """The pipeline of a recipe: the one already there when the recipe is equal, else a new one.

    A recipe that differs in its LoRAs only keeps VAE and text encoder, and loses the transformer.

    Only one pipeline is materialised at a time. The old one is dropped *before* the new one loads, so that two
    models never have to fit.

    Args:
        recipe: what to make.
        residency: who decides what is on the device; used when a pipeline is made.
        default_device: what the recipe's device "auto" means.
        on_load: told of what is downloaded; what it raises stops the download.

    Raises:
        MemoryError: the weights of a hub repository alone would not fit the device; nothing was downloaded.
        CheckpointError: the files are missing, damaged, pickled or do not fit.
        ValueError: the device, dtype or attention backend is not available on this machine.
    """
    global _current
    with _lock:
        if _current is not None and _current.recipe == recipe:
            return _current
        if isinstance(_current, BuiltInPipeline) and replace(recipe, loras=_current.recipe.loras) == _current.recipe:
            _current.change_loras(recipe)
            release_cached_memory(_current.device)
            return _current
        _release_locked()
        _current = _make(recipe, residency or PlainResidency(), default_device or torch.device("cpu"), on_load)
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


def _make(recipe: Recipe, residency: Residency, default_device: torch.device, on_load: LoadCallback) -> StreamPipeline:
    device = choose_device(recipe.device, default_device)
    dtype = choose_dtype(recipe.dtype, device)
    vae_dtype = choose_vae_dtype(dtype, device)
    check_attention_backend(recipe.attention_backend, device)
    check_compile(recipe.compile, device)
    if recipe.blocks != BUILT_IN_BLOCKS:
        pipe = load_foreign_pipeline(recipe, dtype=dtype, vae_dtype=vae_dtype)
        return ForeignPipeline(recipe, pipe, device, residency)
    options = ComponentOptions(dtype, vae_dtype, recipe.quantization, attention_choice(recipe), recipe.loras)
    fetch = partial(_fetch, options=options, available=residency.available_bytes(device), on_load=on_load)
    model = _local_model(recipe, fetch)
    parts = _local_parts(recipe, model, fetch)
    family = recognise_family(model)
    store = ComponentStore(family.components(model, parts, options), device, residency)
    tokenizer = family.load_tokenizer(parts)
    return BuiltInPipeline(recipe, family=family, store=store, tokenizer=tokenizer, device=device, residency=residency)


def _local_model(recipe: Recipe, fetch: Fetch) -> Path:
    """The folder or file of the transformer on this disk, fetched when the user named a hub repository."""
    if recipe.is_hub_id:
        # With components from elsewhere, gigabytes of VAE and text encoder would be fetched for nothing.
        wanted = BUILT_IN_COMPONENTS if recipe.components is None else ("transformer",)
        return fetch(recipe.model, recipe.revision, wanted)
    model = Path(recipe.model)
    refuse_pickled(model)
    if not model.exists():
        raise CheckpointError(
            f"model {recipe.model!r} is not there: choose a folder in models/diffusers, a .safetensors file in "
            "models/diffusion_models, or give a hub id."
        )
    return model


def _local_parts(recipe: Recipe, model: Path, fetch: Fetch) -> Path:
    """The folder of VAE, text encoder and tokenizer."""
    if recipe.components is not None:
        if is_hub_id(recipe.components):
            return fetch(recipe.components, None, SHARED_COMPONENTS)
        return Path(recipe.components)
    if model.is_file():
        raise CheckpointError(
            f"model {recipe.model!r} holds only the transformer: choose a diffusers folder under 'components' for "
            "VAE, text encoder and tokenizer."
        )
    return model


def _fetch(
    name: str,
    revision: str | None,
    components: Sequence[str],
    *,
    options: ComponentOptions,
    available: int | None,
    on_load: LoadCallback,
) -> Path:
    """Download components of a hub repository, unless its transformer alone is more than the device can give."""
    try:
        repository = find_repository(name, revision, components)
    except CheckpointError:
        # Without a network, what an earlier run has downloaded is still there.
        folder = find_cached_folder(name, revision)
        if folder is None:
            raise
        return folder
    quantized = options.quantization is not None and "transformer" in options.quantization.components
    elements = repository.elements("transformer") if available is not None else 0
    least = elements * (1 if quantized else options.dtype.itemsize)
    if available is not None and least > available:
        raise MemoryError(
            f"the transformer of {name!r} alone needs {least / 1e9:.1f} GB and {available / 1e9:.1f} GB are free: "
            "choose a smaller model, or quantize it; nothing was downloaded."
        )
    return repository.fetch(partial(on_load, f"download of {name}"))
