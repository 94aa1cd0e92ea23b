"""Loads a diffusers modular repository: blocks from code that the user has allowed, weights from safetensors."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import diffusers
import torch
import transformers
from diffusers import ModelMixin
from diffusers.modular_pipelines import ModularPipeline, ModularPipelineBlocks
from diffusers.modular_pipelines.modular_pipeline_utils import ComponentSpec
from torch import nn
from transformers.models.auto.auto_factory import _BaseAutoModelClass

from ..checkpoints.checkpoint_error import first_line, shown_word
from ..checkpoints.checkpoint_files import CheckpointError
from ..checkpoints.json_text import read_json
from .abandoned_work import Check, never_cancelled, work_beside
from .code_consent import NOTHING_ALLOWED, AllowedCode, check_code_allowed, check_pinned
from .code_files import ADAPTER_CONFIG, MODULAR_INDEX, MOST_BYTES, MOST_FILES, PIPELINE_INDEX, RepositoryCode, read_code
from .code_import import ImportedCode
from .default_dtype import default_dtype_kept
from .foreign_bounds import MOST_LAYERS, check_config_bounds, count_tensors
from .foreign_index import check_component_classes, check_component_place, refuse_adapters, refuse_fetched_kernels
from .hub import fetch_files, refuse_folder_as_hub_id
from .recipe import Recipe

ResultT = TypeVar("ResultT")

# What diffusers raises for indexes that are not as it writes them.
_UNUSABLE = (OSError, ValueError, ImportError, TypeError, AttributeError, LookupError, AssertionError)
# What diffusers and transformers read by themselves, of a repository and of its components.
_CONFIGS = ("config.json", "*_config.json", "*index.json")
# What has weights; transformers' automatic classes are no modules themselves.
_MODULES = (nn.Module, _BaseAutoModelClass)
# diffusers' own switch.
_DISABLE = "DIFFUSERS_DISABLE_REMOTE_CODE"


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
        check: called while the hub is waited for, also by the libraries; raises to give up.

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
    _check_json(code)
    blocks = code.own_blocks
    imported = None if blocks is None else _import_allowed(recipe, code, allowed)
    try:
        if blocks is None or imported is None:
            pipe = _while_waited_for(recipe.is_hub_id, partial(_pipeline_without_code, recipe, code), check)
        else:
            pipe = _pipeline_of_blocks(recipe, code, imported.load_class(*blocks))
        return _load_components(pipe, recipe, code, imported, (dtype, vae_dtype), check), imported
    except BaseException:
        if imported is not None:
            imported.forget()
        raise


def _import_allowed(recipe: Recipe, code: RepositoryCode, allowed: AllowedCode) -> ImportedCode:
    if code.commit is not None:
        check_pinned(recipe.model, recipe.revision)
    if os.environ.get(_DISABLE, "").upper() in ("1", "ON", "YES", "TRUE"):
        raise CheckpointError(f"model {recipe.model!r} has code of its own, which {_DISABLE} forbids on this machine.")
    check_code_allowed(code, allowed)
    return ImportedCode(code)


def _while_waited_for(on_hub: bool, work: Callable[[], ResultT], check: Check) -> ResultT:
    """Do what calls the hub within the libraries, whose own limits come to minutes, so that it can be given up."""
    return work_beside(work, check) if on_hub else work()


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


def _check_json(code: RepositoryCode) -> None:
    """Raise CheckpointError for configs, also of the hub, with kernels to fetch, or with numbers that no model has."""
    for file in code.files:
        if file.path.endswith(".json"):
            place, config = f"{file.path} of {code.place!r}", code.json(file.path) or {}
            refuse_fetched_kernels(place, config)
            if file.path.endswith("/config.json"):
                check_config_bounds(place, config)


def _pipeline_without_code(recipe: Recipe, code: RepositoryCode) -> ModularPipeline:
    """A repository that uses diffusers' own blocks."""
    check_component_classes(recipe.model, _index(code))
    try:
        return ModularPipeline.from_pretrained(
            recipe.model, trust_remote_code=False, revision=code.commit, local_files_only=not code.reached
        )
    except _UNUSABLE as error:
        raise _not_usable(recipe, error) from error


def _pipeline_of_blocks(recipe: Recipe, code: RepositoryCode, blocks: type) -> ModularPipeline:
    if not issubclass(blocks, ModularPipelineBlocks):
        raise CheckpointError(f"model {recipe.model!r} names {blocks.__name__} as its blocks, which is no such class.")
    index = _index(code)
    check_component_classes(recipe.model, index)
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


def _load_components(
    pipe: ModularPipeline,
    recipe: Recipe,
    code: RepositoryCode,
    imported: ImportedCode | None,
    dtypes: tuple[torch.dtype, torch.dtype],
    check: Check,
) -> ModularPipeline:
    """Load them, as the first of `dtypes`, and the VAE as the second."""
    specs = {name: pipe.get_component_spec(name) for name in pipe.pretrained_component_names}
    for name, spec in specs.items():
        check_component_place(recipe.model, name, spec)
    own = {name for name, spec in specs.items() if spec.pretrained_model_name_or_path == recipe.model}
    for name in own:
        refuse_adapters(code.place, (file.path for file in code.files), specs[name].subfolder or "")
    for name in (name for name, spec in specs.items() if spec.type_hint in (None, diffusers.AutoModel)):
        if name not in own:
            # diffusers would look for it in an index there, and import the library that it names.
            raise CheckpointError(
                f"model {recipe.model!r} names no class for its {shown_word(name)}: name one in its {MODULAR_INDEX}."
            )
        # diffusers would look for the class itself, and import what it finds.
        pipe._component_specs[name].type_hint = _own_class(recipe, code, imported, specs[name].subfolder or "")
    # The specs are copies.
    hints = {name: pipe.get_component_spec(name).type_hint for name in specs}
    modules = [name for name, hint in hints.items() if hint is None or issubclass(hint, _MODULES)]
    at_commit = {name: (code.commit, code.reached) for name in own if specs[name].revision is None and recipe.is_hub_id}
    others = {name for name in specs if name not in own or recipe.is_hub_id} - at_commit.keys()
    from_hub = at_commit | {name: _checked_elsewhere(specs[name], check) for name in others}
    load = partial(
        pipe.load_components,
        dtype={"default": dtypes[0], "vae": dtypes[1]},
        # Never a pickled file, even if a repository has both.
        use_safetensors=dict.fromkeys(modules, True),
        # Without a word, transformers asks on the terminal whether to run code, and a "y" runs it.
        trust_remote_code={name: False for name, hint in hints.items() if _asks(hint)},
        revision={name: commit for name, (commit, _) in from_hub.items()},
        # The libraries would try each file for minutes.
        local_files_only={name: True for name, (_, reached) in from_hub.items() if not reached},
    )
    _while_waited_for(bool(from_hub), default_dtype_kept()(load), check)
    missing = [name for name in pipe.pretrained_component_names if getattr(pipe, name, None) is None]
    if missing:
        raise CheckpointError(
            f"model {recipe.model!r} did not provide {', '.join(map(shown_word, missing))}: its files are incomplete, "
            "not safetensors, or need code, which only blocks and a model of diffusers' may bring; the log above says "
            "why."
        )
    return pipe


def _checked_elsewhere(spec: ComponentSpec, check: Check) -> tuple[str, bool]:
    """The commit of another repository, or of another revision of this one, whose configs are checked.

    And whether the hub was asked; see `FetchedFiles`.
    """
    place, folder = str(spec.pretrained_model_name_or_path), f"{spec.subfolder}/".lstrip("/")

    def wanted(path: str) -> bool:
        beside = path.startswith(folder) and "/" not in path[len(folder) :] and path.endswith("config.json")
        return beside or path == ADAPTER_CONFIG

    fetched = fetch_files(place, spec.revision, wanted, most_files=MOST_FILES, most_bytes=MOST_BYTES, check=check)
    adapters = (file.relative_to(fetched.folder).as_posix() for file in fetched.folder.rglob(ADAPTER_CONFIG))
    refuse_adapters(place, adapters, folder.rstrip("/"))
    config = fetched.folder / folder / "config.json"
    if config.exists():
        content, name = read_json(config), f"{folder}config.json of {place!r}"
        refuse_fetched_kernels(name, content)
        check_config_bounds(name, content)
    return fetched.commit, fetched.reached


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
