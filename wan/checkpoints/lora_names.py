"""LoRA files for a Wan transformer: what they may call its layers, and which of them it does not take."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from ...checkpoints.checkpoint_files import CheckpointError
from ...checkpoints.lora_choice import LoraChoice, LoraMatch
from ...checkpoints.lora_files import LoraFile, change_sources, flat_name, read_lora
from ...checkpoints.row_sources import RowSource
from .original_names import original_name

# Layers of image-to-video transformers, in Wan's and in diffusers' names.
_IMAGE_MARKS = ("k_img", "v_img", "img_emb_", "add_k_proj", "add_v_proj", "image_embedder")


def lora_layer_names(parameters: Iterable[str]) -> dict[str, str]:
    """Every flat name that a LoRA file may have for a layer, to the layer's name here.

    Args:
        parameters: diffusers' parameter names of a transformer, projections not joined.

    Returns:
        Wan's and diffusers' names, dots as underscores. diffusers' LoRA converters would do for most files, but they
        scale tensors as they rename them, and drop what is said of norms.
    """
    names: dict[str, str] = {}
    for parameter in parameters:
        # A bias is named by its layer too; a file may change it alone under its own name.
        layer = parameter.removesuffix(".weight")
        names[flat_name(layer)] = names[flat_name(original_name(layer))] = layer
    return names


def put_loras_on(
    sources: Mapping[str, RowSource], choices: Sequence[LoraChoice], model: Path
) -> tuple[Mapping[str, RowSource], tuple[LoraMatch, ...]]:
    """The parameters of a transformer with LoRAs on them, one after another, and what of each was found.

    Raises CheckpointError, from headers, for a LoRA that cannot be read, is for image-to-video, matches nothing or
    belongs to another size.
    """
    names = lora_layer_names(sources)
    matches = []
    for choice in choices:
        lora = read_lora(Path(choice.path))
        _refuse_image_to_video(lora)
        sources, match = change_sources(sources, lora, choice, names, model)
        matches.append(match)
    return sources, tuple(matches)


def _refuse_image_to_video(lora: LoraFile) -> None:
    name = next((name for name in lora.layers if any(mark in name for mark in _IMAGE_MARKS)), None)
    if name is not None:
        key = next(iter(lora.layers[name].values())).key
        raise CheckpointError(
            f"{lora.path} is a LoRA for an image-to-video model ({key}): choose one made for text to video."
        )
