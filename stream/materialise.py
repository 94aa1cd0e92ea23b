"""Recipe to pipeline: the one materialised pipeline of the process."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from ..checkpoints.checkpoint_files import CheckpointError
from ..families.model_family import ComponentOptions, ModelFamily, ModelSources
from ..memory.byte_text import format_gb
from ..memory.cleanup import release_cached_memory
from .code_consent import NOTHING_ALLOWED, AllowedCode
from .component_store import ComponentStore, LoadCallback, ignore_load
from .device_choice import check_attention_backend, check_compile, choose_device, choose_dtype, choose_vae_dtype
from .estimate import attention_choice
from .foreign import ForeignPipeline
from .foreign_loading import load_foreign_pipeline
from .hub import BUILT_IN_COMPONENTS, find_cached_folder, find_repository
from .known_families import recognise_family
from .pipelines import BuiltInPipeline
from .recipe import AVERAGED_WEIGHTS, BUILT_IN_BLOCKS, DOWNLOAD_OF, Recipe, is_hub_id
from .residency import PlainResidency, Residency
from .stream_pipeline import StreamPipeline

# Hub id, revision and components to the folder they are in.
Fetch = Callable[[str, str | None, Sequence[str]], Path]

# Those that may be a file of their own.
_ALONE = ("vae", "text_encoder")
SHARED_COMPONENTS = ("vae", "text_encoder", "tokenizer")

_lock = threading.Lock()
_current: StreamPipeline | None = None


def materialise(
    recipe: Recipe,
    *,
    residency: Residency | None = None,
    default_device: torch.device | None = None,
    on_load: LoadCallback = ignore_load,
    allowed_code: AllowedCode = NOTHING_ALLOWED,
) -> StreamPipeline:
    """The pipeline of a recipe: the current one if its recipe is equal, else a new one.

    A recipe that differs in its LoRAs only keeps VAE and text encoder, and loses the transformer.

    Only one pipeline is materialised at a time. The old one is dropped *before* the new one loads, so that two
    models never have to fit.

    Args:
        recipe: what to make.
        residency: decides what is on the device; used when a pipeline is made.
        default_device: what the recipe's device "auto" means.
        on_load: called with the progress of downloads; if it raises, the download stops.
        allowed_code: which repositories' own code the user allows.

    Raises:
        CodeNotAllowedError: the repository has blocks of its own, and its code is not allowed.
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
        device = default_device or torch.device("cpu")
        _current = _make(recipe, residency or PlainResidency(), device, on_load, allowed_code)
        return _current


def materialised_device() -> torch.device | None:
    """The device of the materialised pipeline; None when there is none."""
    with _lock:
        return None if _current is None else _current.device


def release_materialised() -> None:
    """Drop the materialised pipeline, if there is one, and free its memory."""
    with _lock:
        _release_locked()


def _release_locked() -> None:
    global _current
    if _current is None:
        return
    pipeline, _current = _current, None
    pipeline.release()
    release_cached_memory(pipeline.device)


def _make(
    recipe: Recipe,
    residency: Residency,
    default_device: torch.device,
    on_load: LoadCallback,
    allowed_code: AllowedCode,
) -> StreamPipeline:
    device = choose_device(recipe.device, default_device)
    dtype = choose_dtype(recipe.dtype, device)
    vae_dtype = choose_vae_dtype(dtype, device)
    check_attention_backend(recipe.attention_backend, device, dtype=dtype)
    check_compile(recipe.compile, device)
    if recipe.blocks != BUILT_IN_BLOCKS:
        pipe, imported = load_foreign_pipeline(
            recipe,
            dtype=dtype,
            vae_dtype=vae_dtype,
            allowed=allowed_code,
            # Nothing has come yet: who watches may only cancel.
            check=partial(on_load, f"{DOWNLOAD_OF}{recipe.model}", 0, 0),
        )
        return ForeignPipeline(recipe, pipe, device, residency, imported)
    averaged = recipe.weights == AVERAGED_WEIGHTS
    attention = attention_choice(recipe, device)
    options = ComponentOptions(dtype, vae_dtype, recipe.quantization, attention, recipe.loras, averaged)
    fetch = partial(_fetch, options=options, available=residency.available_bytes(device), on_load=on_load)
    model = _local_model(recipe, fetch)
    family = recognise_family(model)
    sources = _local_sources(recipe, model, family, fetch)
    store = ComponentStore(family.components(sources, options), device, residency)
    return BuiltInPipeline(
        recipe,
        family=family,
        store=store,
        load_tokenizer=partial(family.load_tokenizer, sources),
        device=device,
        residency=residency,
    )


def _local_sources(recipe: Recipe, model: Path, family: ModelFamily, fetch: Fetch) -> ModelSources:
    """Where everything is on this disk; what the user named on the hub is fetched.

    Raises CheckpointError when something is not there, or nothing was named for the VAE. Without a text encoder a
    stream is possible whose prompt comes as embeddings.
    """
    parts = _local_parts(recipe, model, fetch)
    named = _named_alone(recipe)
    beside = family.parts_in(model) if parts is None and len(named) < len(_ALONE) else frozenset()
    vae, text_encoder = (
        _existing_file(name, getattr(recipe, name)) if name in named else _unnamed_part(name, parts, model, beside)
        for name in _ALONE
    )
    if vae is None:
        raise CheckpointError(
            f"model {recipe.model!r} holds only the transformer: choose files under 'vae' and 'text_encoder', or a "
            "diffusers folder under 'components' for VAE, text encoder and tokenizer."
        )
    decoder = None if recipe.decoder is None else _existing_file("decoder", recipe.decoder)
    if recipe.tokenizer is not None:
        return ModelSources(model, vae, text_encoder, (_existing_file("tokenizer", recipe.tokenizer),), decoder)
    places = dict.fromkeys(place for place in (text_encoder, parts, model) if place is not None)
    return ModelSources(model, vae, text_encoder, tuple(places), decoder)


def _unnamed_part(name: str, parts: Path | None, model: Path, beside: frozenset[str]) -> Path | None:
    """Where a component is that the user chose no file for: in the folder `parts`, or in the file of the transformer.

    Args:
        name: of the component.
        parts: None where there is no such folder.
        model: the transformer's file.
        beside: what else it holds.
    """
    if parts is None:
        return model if name in beside else None
    # A folder without a VAE is reported when it is read.
    return parts if name == "vae" or (parts / name).is_dir() else None


def _existing_file(name: str, place: str) -> Path:
    path = Path(place)
    if not path.exists():
        raise CheckpointError(f"{name} {place!r} is not there: refresh the page (key R) and choose another file.")
    return path


def _named_alone(recipe: Recipe) -> set[str]:
    """The components that the user chose a file for."""
    return {name for name in _ALONE if getattr(recipe, name) is not None}


def _local_model(recipe: Recipe, fetch: Fetch) -> Path:
    """The folder or file of the transformer on this disk, fetched when the user named a hub repository."""
    if recipe.is_hub_id:
        # If components come from elsewhere, this repository's VAE and text encoder (gigabytes) are not needed.
        wanted = BUILT_IN_COMPONENTS if recipe.components is None else ("transformer",)
        return fetch(recipe.model, recipe.revision, [name for name in wanted if name not in _named_alone(recipe)])
    model = Path(recipe.model)
    if not model.exists():
        raise CheckpointError(
            f"model {recipe.model!r} is not there: choose a folder in models/diffusers, a file in "
            "models/diffusion_models, or give a hub id."
        )
    return model


def _local_parts(recipe: Recipe, model: Path, fetch: Fetch) -> Path | None:
    """The folder of VAE, text encoder and tokenizer, as far as the user chose no files for them; None for none."""
    if recipe.components is not None:
        if is_hub_id(recipe.components):
            wanted = [name for name in SHARED_COMPONENTS if name not in _named_alone(recipe)]
            return fetch(recipe.components, None, wanted)
        return Path(recipe.components)
    return None if model.is_file() else model


def _fetch(
    name: str,
    revision: str | None,
    components: Sequence[str],
    *,
    options: ComponentOptions,
    available: int | None,
    on_load: LoadCallback,
) -> Path:
    """Download components of a hub repository, unless its transformer alone exceeds the device's memory."""
    download = partial(on_load, f"{DOWNLOAD_OF}{name}")
    # Nothing has come yet: who watches may only cancel.
    check = partial(download, 0, 0)
    try:
        repository = find_repository(name, revision, components, check)
    except CheckpointError:
        # Without a network, use what an earlier run has downloaded.
        folder = find_cached_folder(name, revision)
        if folder is None:
            raise
        return folder
    quantized = options.quantization is not None and "transformer" in options.quantization.components
    elements = repository.elements("transformer", check) if available is not None else 0
    least = elements * (1 if quantized else options.dtype.itemsize)
    if available is not None and least > available:
        raise MemoryError(
            f"the transformer of {name!r} alone needs {format_gb(least)} and {format_gb(available)} are free: "
            "choose a smaller model, or quantize it; nothing was downloaded."
        )
    return repository.fetch(download)
