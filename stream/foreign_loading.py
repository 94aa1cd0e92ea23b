"""Loads a diffusers modular repository: blocks from code that the user has allowed, weights from safetensors."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers import DiffusionPipeline, ModelMixin
from diffusers.modular_pipelines import ModularPipeline, ModularPipelineBlocks
from torch import nn

from ..checkpoints.checkpoint_error import first_line, shown, shown_word
from ..checkpoints.checkpoint_files import CheckpointError
from ..checkpoints.json_text import read_json
from .abandoned_work import Check, never_cancelled
from .code_consent import NOTHING_ALLOWED, AllowedCode, check_code_allowed, check_pinned
from .code_files import MODULAR_INDEX, PIPELINE_INDEX, RepositoryCode, read_code
from .code_import import ImportedCode
from .foreign_bounds import MOST_LAYERS, check_config_bounds, count_tensors
from .hub import refuse_folder_as_hub_id
from .recipe import Recipe, is_hub_id

# What diffusers raises for indexes that are not as it writes them.
_UNUSABLE = (OSError, ValueError, ImportError, TypeError, AttributeError, LookupError, AssertionError)
# What diffusers and transformers read by themselves, of a repository and of its components.
_CONFIGS = ("config.json", "*_config.json", "*index.json")
# diffusers' own switch.
_DISABLE = "DIFFUSERS_DISABLE_REMOTE_CODE"
_LIBRARIES = {"diffusers": diffusers, "transformers": transformers}
# They look for what to load in files of their own, which could name anything.
_NOT_A_COMPONENT = (DiffusionPipeline, ModularPipeline)


def load_foreign_pipeline(
    recipe: Recipe,
    *,
    dtype: torch.dtype,
    vae_dtype: torch.dtype,
    allowed: AllowedCode = NOTHING_ALLOWED,
    check: Check = never_cancelled,
) -> tuple[ModularPipeline, ImportedCode | None]:
    """The pipeline of a repository, and its imported code, which is to be forgotten with it; None if it has none.

    Only blocks, and models of the repository itself that are diffusers', come from its code. Tokenizers and text
    encoders never do, nor does anything from another repository.

    Args:
        recipe: of the repository.
        dtype: of all components but the VAE.
        vae_dtype: of the VAE.
        allowed: which code the user allows.
        check: called while the hub is asked for the repository, before diffusers asks, whose own calls wait minutes
            for a hub that does not answer; raises to give up.

    Raises:
        CheckpointError: the repository cannot be used, or a component did not load.
        CodeNotAllowedError: it has code of its own that the user has not allowed; nothing of it ran.
        ValueError: it has, and no commit of it is pinned.
    """
    if recipe.is_hub_id:
        refuse_folder_as_hub_id(recipe.model)
    code = read_code(recipe.model, recipe.revision, check)
    if not recipe.is_hub_id:
        _check_configs(Path(recipe.model))
    _refuse_fetched_kernels(code)
    _check_bounds(code)
    blocks = code.own_blocks
    if blocks is None:
        return _load_components(_pipeline_without_code(recipe, code), recipe, code, None, dtype, vae_dtype), None
    if code.commit is not None:
        check_pinned(recipe.model, recipe.revision)
    if os.environ.get(_DISABLE, "").upper() in ("1", "ON", "YES", "TRUE"):
        raise CheckpointError(f"model {recipe.model!r} has code of its own, which {_DISABLE} forbids on this machine.")
    check_code_allowed(code, allowed)
    imported = ImportedCode(code)
    try:
        pipe = _pipeline_of_blocks(recipe, code, imported.load_class(*blocks))
        return _load_components(pipe, recipe, code, imported, dtype, vae_dtype), imported
    except BaseException:
        imported.forget()
        raise


def _check_configs(folder: Path) -> None:
    """Raise CheckpointError for a config that diffusers would wait for, or fail on without its name."""
    for pattern in _CONFIGS:
        for path in sorted((*folder.glob(pattern), *folder.glob(f"*/{pattern}"))):
            config = read_json(path)
            # Not the vocabulary of a tokenizer, nor the names of shards.
            if path.parent != folder and path.name.endswith("config.json") and not path.name.startswith("tokenizer"):
                tensors = count_tensors(path.parent)
                layers = MOST_LAYERS if tensors is None else min(MOST_LAYERS, tensors)
                check_config_bounds(str(path), config, layers)


def _check_bounds(code: RepositoryCode) -> None:
    """Raise CheckpointError for numbers in the configs of components, also those of the hub, that no model has."""
    for file in code.files:
        if file.path.endswith("/config.json"):
            check_config_bounds(f"{file.path} of {code.place!r}", code.json(file.path) or {})


def _refuse_fetched_kernels(code: RepositoryCode) -> None:
    """Refuse configs that name attention kernels of a hub repository, which transformers fetches and runs.

    Raises CheckpointError.
    """
    for file in code.files:
        left: list[Any] = [code.json(file.path)] if file.path.endswith(".json") else []
        while left:
            value = left.pop()
            if isinstance(value, dict):
                kernels = value.get("attn_implementation") or value.get("_attn_implementation")
                if "/" in str(kernels):
                    raise CheckpointError(
                        f"{file.path} of {code.place!r} names attention kernels of the hub, {str(kernels)[:80]!r}, "
                        "which would run as code: take the entry out of the file."
                    )
            left += value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()


def _pipeline_without_code(recipe: Recipe, code: RepositoryCode) -> ModularPipeline:
    """A repository that uses diffusers' own blocks."""
    _check_index(recipe.model, _index(code))
    try:
        return ModularPipeline.from_pretrained(recipe.model, trust_remote_code=False, revision=code.commit)
    except _UNUSABLE as error:
        raise _not_usable(recipe, error) from error


def _pipeline_of_blocks(recipe: Recipe, code: RepositoryCode, blocks: type) -> ModularPipeline:
    if not issubclass(blocks, ModularPipelineBlocks):
        raise CheckpointError(f"model {recipe.model!r} names {blocks.__name__} as its blocks, which is no such class.")
    index = _index(code)
    _check_index(recipe.model, index)
    modular, plain = code.json(MODULAR_INDEX), code.json(PIPELINE_INDEX)
    found = getattr(diffusers, str(index.get("_class_name")), None)
    pipeline_class = found if isinstance(found, type) and issubclass(found, ModularPipeline) else ModularPipeline
    try:
        pipe: ModularPipeline = pipeline_class(
            blocks=blocks(),
            pretrained_model_name_or_path=recipe.model if index else None,
            modular_config_dict=modular,
            config_dict=None if modular is not None else plain,
        )
    except _UNUSABLE as error:
        raise _not_usable(recipe, error) from error
    return pipe


def _not_usable(recipe: Recipe, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"model {recipe.model!r} is not a diffusers modular repository that can be used here ({first_line(error)})."
    )


def _index(code: RepositoryCode) -> dict[str, Any]:
    modular = code.json(MODULAR_INDEX)
    return (code.json(PIPELINE_INDEX) or {}) if modular is None else modular


def _check_index(model: str, index: Mapping[str, Any]) -> None:
    """Refuse components of other libraries than the two: to look one up is to import it, with what it runs.

    Raises CheckpointError.
    """
    for name, value in index.items():
        if not isinstance(value, list) or len(value) not in (2, 3):
            continue
        hint: object = value[:2]
        if len(value) == 3:
            hint = value[2].get("type_hint") if isinstance(value[2], dict) else None
        if not isinstance(hint, list) or len(hint) != 2 or (hint != [None, None] and not _is_component(*hint)):
            raise CheckpointError(
                f"model {model!r} names {shown(hint)} as the class of its {shown_word(name)}: only classes of "
                "diffusers and transformers are loaded."
            )


def _is_component(library: object, name: object) -> bool:
    room = _LIBRARIES.get(library) if isinstance(library, str) else None
    found = getattr(room, name, None) if room is not None and isinstance(name, str) else None
    return isinstance(found, type) and not issubclass(found, _NOT_A_COMPONENT)


def _load_components(
    pipe: ModularPipeline,
    recipe: Recipe,
    code: RepositoryCode,
    imported: ImportedCode | None,
    dtype: torch.dtype,
    vae_dtype: torch.dtype,
) -> ModularPipeline:
    _refuse_other_places(recipe, pipe)
    specs = {name: pipe.get_component_spec(name) for name in pipe.pretrained_component_names}
    own = {name for name, spec in specs.items() if spec.pretrained_model_name_or_path == recipe.model}
    for name in (name for name, spec in specs.items() if spec.type_hint in (None, diffusers.AutoModel)):
        if name in own:
            # diffusers would look for the class itself, and import what it finds.
            pipe._component_specs[name].type_hint = _own_class(recipe, code, imported, specs[name].subfolder or "")
        elif imported is None:
            raise CheckpointError(
                f"model {recipe.model!r} names no class for its {shown_word(name)}: name one in its {MODULAR_INDEX}."
            )
    # The specs are copies.
    hints = {name: pipe.get_component_spec(name).type_hint for name in specs}
    modules = [name for name, hint in hints.items() if hint is None or issubclass(hint, nn.Module)]
    pipe.load_components(
        dtype={"default": dtype, "vae": vae_dtype},
        # Never a pickled file, even if a repository has both.
        use_safetensors=dict.fromkeys(modules, True),
        # Without a word, transformers asks on the terminal whether to run code, and a "y" runs it.
        trust_remote_code={name: False for name, hint in hints.items() if _asks(hint)},
        revision={name: code.commit for name in own if code.commit is not None and specs[name].revision is None},
    )
    missing = [name for name in pipe.pretrained_component_names if getattr(pipe, name, None) is None]
    if missing:
        raise CheckpointError(
            f"model {recipe.model!r} did not provide {', '.join(map(shown_word, missing))}: its files are incomplete, "
            "not safetensors, or need code, which only blocks and a model of diffusers' may bring; the log above says "
            "why."
        )
    return pipe


def _asks(hint: type | None) -> bool:
    """Whether loading the class takes the option, and may ask without it."""
    return hint is None or hint is diffusers.AutoModel or hint.__module__.startswith("transformers.")


def _own_class(recipe: Recipe, code: RepositoryCode, imported: ImportedCode | None, subfolder: str) -> type:
    """The class of a component whose index names none: of the repository's code, or of a library, by its config."""
    named = code.own_model(subfolder)
    if named is not None:
        if imported is None:
            raise CheckpointError(
                f"model {recipe.model!r} has code for its {shown_word(subfolder)} and none for its blocks: only a "
                "repository that brings blocks may bring code."
            )
        found = imported.load_class(*named)
        if not issubclass(found, ModelMixin):
            raise CheckpointError(f"the class {found.__name__} of {recipe.model!r} is no model of diffusers'.")
        return found
    config = code.json(f"{subfolder}/config.json" if subfolder else "config.json") or {}
    if "_class_name" in config:
        found_by_name = getattr(diffusers, str(config["_class_name"]), None)
        if isinstance(found_by_name, type) and issubclass(found_by_name, ModelMixin):
            return found_by_name
    elif "model_type" in config:
        return transformers.AutoModel
    part = shown_word(subfolder or "model")
    raise CheckpointError(
        f"model {recipe.model!r} names no class of diffusers or transformers for its {part}: name one in its "
        f"{MODULAR_INDEX}."
    )


def _refuse_other_places(recipe: Recipe, pipe: ModularPipeline) -> None:
    """Components come from the repository or from the hub; its index could name any path on this machine."""
    for name in pipe.pretrained_component_names:
        place = getattr(pipe.get_component_spec(name), "pretrained_model_name_or_path", None)
        if place is None or str(place) == recipe.model:
            continue
        if not is_hub_id(str(place)):
            raise CheckpointError(
                f"model {recipe.model!r} takes its {shown_word(name)} from {shown(str(place))}, which is outside of "
                "it: name the repository itself or a hub id in its modular_model_index.json."
            )
        refuse_folder_as_hub_id(str(place))
