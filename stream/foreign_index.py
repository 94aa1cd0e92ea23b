"""What a stranger's index and configs may name: classes of two libraries, places of its own, and no code to fetch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import PurePosixPath
from typing import Any

import diffusers
import transformers
from diffusers import AutoModel, ConfigMixin, DiffusionPipeline, ModelMixin, SchedulerMixin
from diffusers.modular_pipelines import ModularPipeline, ModularPipelineBlocks
from diffusers.modular_pipelines.modular_pipeline_utils import ComponentSpec

from ..checkpoints.checkpoint_error import shown, shown_word
from ..checkpoints.checkpoint_files import CheckpointError
from .code_files import ADAPTER_CONFIG
from .hub import refuse_folder_as_hub_id
from .recipe import is_hub_id

# What is built of a config and safetensors. Others may read what they like: transformers' RagRetriever unpickles where
# an environment variable says so.
_KINDS: dict[str, tuple[type, ...]] = {
    "diffusers": (AutoModel, ModelMixin, SchedulerMixin, ConfigMixin),
    "transformers": (
        transformers.PreTrainedModel,
        transformers.PreTrainedTokenizerBase,
        transformers.ProcessorMixin,
        transformers.FeatureExtractionMixin,
        transformers.image_processing_base.ImageProcessingMixin,
    ),
}
# Those choose one of the kinds by a config.
_CHOOSING = "transformers.models.auto."
# They look for what to load in files of their own, which could name anything.
_NOT_A_COMPONENT = (DiffusionPipeline, ModularPipeline, ModularPipelineBlocks)
_LIBRARIES = {"diffusers": diffusers, "transformers": transformers}


def check_component_classes(model: str, index: Mapping[str, Any]) -> None:
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
    kinds = _KINDS.get(library) if isinstance(library, str) else None
    if kinds is None or not isinstance(library, str) or not isinstance(name, str):
        return False
    found = getattr(_LIBRARIES[library], name, None)
    if not isinstance(found, type) or issubclass(found, _NOT_A_COMPONENT):
        return False
    return issubclass(found, kinds) or found.__module__.startswith(_CHOOSING)


def refuse_fetched_kernels(place: str, config: Mapping[str, Any]) -> None:
    """Refuse a config that names kernels of a hub repository, which transformers fetches and runs.

    Args:
        place: of the config, for the message.
        config: of a component, or of a whole pipeline.

    Raises CheckpointError.
    """
    left: list[Any] = [config]
    while left:
        value = left.pop()
        if isinstance(value, dict):
            kernels = [value[name] for name in value if "implementation" in name.lower() and "/" in str(value[name])]
            if kernels:
                raise CheckpointError(
                    f"{place} names kernels of the hub, {str(kernels[0])[:80]!r}, which would run as code: take the "
                    "entry out of the file."
                )
        left += value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()


def refuse_adapters(place: str, paths: Iterable[str], subfolder: str) -> None:
    """Refuse a component with an adapter of peft's beside it, which names what transformers loads in its place.

    Args:
        place: the repository or folder, for the message.
        paths: of files in it, with `/`.
        subfolder: of the component, "" for the root, where transformers looks, too.

    Raises CheckpointError.
    """
    found = {ADAPTER_CONFIG, f"{subfolder}/{ADAPTER_CONFIG}".lstrip("/")}.intersection(paths)
    if found:
        raise CheckpointError(
            f"{min(found)} of {place!r} has another model loaded in place of the component beside it: take the file "
            "away, and use a component with the adapter merged into it."
        )


def check_component_place(model: str, name: str, spec: ComponentSpec) -> None:
    """Components come from the repository or from the hub; its index could name any path on this machine.

    Raises CheckpointError.
    """
    subfolder = spec.subfolder or ""
    if {"..", ".", "/"} & set(PurePosixPath(subfolder).parts) or any(sign in subfolder for sign in "\\:"):
        raise CheckpointError(
            f"model {model!r} takes its {shown_word(name)} from the folder {shown(subfolder)}, which may be outside of "
            "it: name a folder inside of the repository in its index."
        )
    if spec.pretrained_model_name_or_path is None:
        raise CheckpointError(
            f"model {model!r} does not say where its {shown_word(name)} is: name the repository itself or a hub id in "
            "its modular_model_index.json."
        )
    place = str(spec.pretrained_model_name_or_path)
    if place == model:
        return
    if not is_hub_id(place):
        raise CheckpointError(
            f"model {model!r} takes its {shown_word(name)} from {shown(place)}, which is outside of it: name the "
            "repository itself or a hub id in its modular_model_index.json."
        )
    refuse_folder_as_hub_id(place)
