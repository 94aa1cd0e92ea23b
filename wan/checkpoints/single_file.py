"""A Wan transformer in one file: whose names it uses, and which model it is.

Everything is derived from the header: parameters are renamed by name, and the config is inferred from the shapes.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel

from ...checkpoints.checkpoint_error import CheckpointError, first_line
from ...checkpoints.checkpoint_reading import read_checkpoint
from ...checkpoints.comfy_format import gather_quantized
from ...checkpoints.file_kinds import CHECKPOINT_SUFFIXES
from ...checkpoints.json_text import parse_json
from ...checkpoints.layer_numbers import count_layers
from ...checkpoints.row_sources import RowSource
from ...ops.quantization import QuantizationSpec
from .class_defaults import with_defaults
from .config_bounds import check_transformer_config
from .renaming import renamed_by
from .transformer_building import check_complete
from .transformer_configs import published_layers
from .wrapper_names import ANCHOR, find_prefix, strip_wrappers

HEAD_DIM = 128

# The header field with what ComfyUI's format has no place for, in the files that this pack writes.
OWN_METADATA_KEY = "streamblocks"
_ORIGINAL_MARK = "time_embedding.0.weight"
_DIFFUSERS_MARK = "condition_embedder.time_embedder.linear_1.weight"
_VARIANTS = {
    "an image-to-video transformer": ("img_emb.", ".k_img.", "image_embedder.", ".add_k_proj."),
    "a VACE transformer": ("vace_",),
    "a Wan-Animate transformer": ("face_adapter.", "motion_encoder."),
    "a speech-to-video transformer": ("casual_audio_encoder.", "audio_injector."),
    "a camera-control transformer": ("control_adapter.",),
}
_SHARD = re.compile(r"-\d{5}-of-(\d{5})$")
_KNOWN_SIZES = {(1536, 30, 8960): "1.3B", (5120, 40, 13824): "14B", (3072, 30, 14336): "5B"}


@dataclass(frozen=True)
class SingleFileCheckpoint:
    """What a single file holds: `config` for WanTransformer3DModel and where each parameter is stored.

    `sources` maps diffusers' parameter names; `prefix` precedes the names in the file; `spec` is how this pack
    quantized the file, None for other programs' files and for unquantized ones.
    """

    path: Path
    prefix: str
    config: Mapping[str, Any]
    sources: Mapping[str, RowSource]
    spec: QuantizationSpec | None = None

    @property
    def name(self) -> str:
        """The usual name of the size: `1.3B`, `14B`, or for example `256x2 custom` (width x layers)."""
        dim = self.config["num_attention_heads"] * self.config["attention_head_dim"]
        layers = self.config["num_layers"]
        return _KNOWN_SIZES.get((dim, layers, self.config["ffn_dim"]), f"{dim}x{layers} custom")


def recognise_single_file(path: Path, *, averaged: bool = True) -> SingleFileCheckpoint:
    """Read the header of `path` and say which Wan text-to-video transformer it holds.

    Args:
        path: a safetensors file, or one that `torch.save` wrote.
        averaged: of a training checkpoint with both, take the exponential moving average of the weights.

    Raises:
        CheckpointError: the file is absent, damaged, a shard, or no checkpoint; layers or other tensors of the
            transformer are missing, or some are unknown; it is quantized in other formats than ComfyUI's FP8 and INT8,
            or without scales; it holds another Wan transformer (image-to-video, VACE and so on), or anything else.
    """
    _check_name(path)
    header = read_checkpoint(path)
    prefix = find_prefix(path, header.tensors, averaged=averaged)
    gathered = gather_quantized(path, header, strip_wrappers(path, header.tensors, prefix), prefix)
    own_config, spec = _own_metadata(path, header.metadata)
    sources = {name: gathered[original] for name, original in diffusers_names(path, gathered).items()}
    # What a config leaves out has the default of diffusers' class.
    config = with_defaults(WanTransformer3DModel, _config_of(path, sources) if own_config is None else own_config)
    check_transformer_config(path, config)
    check_complete(path, config, sources)
    return SingleFileCheckpoint(path, prefix, MappingProxyType(config), MappingProxyType(sources), spec)


def holds_transformer(path: Path, channels: int) -> bool:
    """Whether the file `path` holds a Wan transformer of `channels` latent channels, by its header.

    Raises CheckpointError for a file that cannot be read.
    """
    if not path.is_file():
        return False
    shapes = [tensor.shape for key, tensor in read_checkpoint(path).tensors.items() if key.endswith(ANCHOR)]
    return any(len(shape) == 5 and shape[1] == channels for shape in shapes)


def _check_name(path: Path) -> None:
    """Raise CheckpointError for what the name alone says."""
    suffix = path.suffix.lower()
    if suffix not in CHECKPOINT_SUFFIXES | {".gguf"}:
        raise CheckpointError(
            f"{path} has the suffix {suffix!r}, allowed are {', '.join(sorted(CHECKPOINT_SUFFIXES))}: give a Wan "
            "transformer in one of these formats."
        )
    shard = _SHARD.search(path.stem)
    if shard is not None and int(shard[1]) > 1:
        raise CheckpointError(
            f"{path} is one of the {int(shard[1])} shards of a model, which alone is not the whole: choose the "
            "diffusers folder with all of them and their index, or a file with the whole transformer."
        )


def _config_of(path: Path, sources: Mapping[str, RowSource]) -> dict[str, Any]:
    """The config behind the shapes in `path`, which must have all layers of the published model of its widths."""
    config = config_from_shapes(path, {name: source.shape for name, source in sources.items()})
    width, layers = config["num_attention_heads"] * config["attention_head_dim"], config["num_layers"]
    published = published_layers(width, config["ffn_dim"])
    if published is not None and layers < published:
        raise CheckpointError(
            f"{path} has {layers} layers of width {width}, and Wan's transformer of that width has {published}: the "
            "file is not complete, download it again, or choose the diffusers folder of a model that has fewer."
        )
    return config


def config_from_shapes(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """The WanTransformer3DModel keyword arguments that give these parameter shapes, under diffusers' names.

    Heads are not visible in the shapes: Wan's have 128 channels each. Raises CheckpointError for shapes that
    no Wan text-to-video transformer has; `path` is named in it.
    """

    def shape_of(name: str, dimensions: int) -> tuple[int, ...]:
        return _shape(path, shapes, name, dimensions)

    dim, in_channels, *patch = shape_of("patch_embedding.weight", 5)
    out_rows, _ = shape_of("proj_out.weight", 2)
    out_channels = out_rows // math.prod(patch)
    if dim % HEAD_DIM:
        raise CheckpointError(
            f"{path}: the width {dim} is no multiple of {HEAD_DIM}, the channels of a Wan head: give a diffusers "
            "folder, whose config.json says how many heads there are."
        )
    if in_channels != out_channels:
        raise CheckpointError(
            f"{path}: the transformer takes {in_channels} latent channels and gives {out_channels}, as "
            "image-to-video ones do: give a text-to-video transformer, which takes as many as it gives."
        )
    return {
        "patch_size": tuple(patch),
        "num_attention_heads": dim // HEAD_DIM,
        "attention_head_dim": HEAD_DIM,
        "in_channels": in_channels,
        "out_channels": out_channels,
        "text_dim": shape_of("condition_embedder.text_embedder.linear_1.weight", 2)[1],
        "freq_dim": shape_of(_DIFFUSERS_MARK, 2)[1],
        "ffn_dim": shape_of("blocks.0.ffn.net.0.proj.weight", 2)[0],
        "num_layers": count_layers(path, shapes, "blocks."),
        "cross_attn_norm": "blocks.0.norm2.weight" in shapes,
    }


def _shape(path: Path, shapes: Mapping[str, tuple[int, ...]], name: str, dimensions: int) -> tuple[int, ...]:
    shape = shapes.get(name)
    if shape is None or len(shape) != dimensions or 0 in shape:
        raise CheckpointError(
            f"{path}: {name} is {'absent' if shape is None else list(shape)} and must have {dimensions} dimensions: "
            "give a Wan transformer."
        )
    return shape


def _own_metadata(path: Path, metadata: Mapping[str, str]) -> tuple[dict[str, Any] | None, QuantizationSpec | None]:
    """The config and quantization that this pack wrote into the header of `path`; None in other programs' files."""
    text = metadata.get(OWN_METADATA_KEY)
    if text is None:
        return None, None
    place = f"the header field {OWN_METADATA_KEY} of {path}"
    own = parse_json(text, place)
    config, quantization = own.get("config"), own.get("quantization")
    try:
        if not isinstance(config, dict) or not isinstance(quantization or {}, dict):
            raise ValueError("config and quantization are no objects")
        return config, QuantizationSpec.from_dict(quantization) if quantization else None
    except (ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{place} cannot be read ({first_line(error)}): save the model again.") from error


def diffusers_names(path: Path, sources: Mapping[str, RowSource]) -> dict[str, str]:
    """The names of `sources` by diffusers' names for them, whichever of the two namings they are in."""
    for variant, marks in _VARIANTS.items():
        mark = next((mark for mark in marks if any(mark in name for name in sources)), None)
        if mark is not None:
            raise CheckpointError(f"{path} is {variant} ({mark.strip('.')}): give a text-to-video transformer of Wan.")
    if _DIFFUSERS_MARK in sources:
        return {name: name for name in sources}
    if _ORIGINAL_MARK not in sources:
        raise CheckpointError(
            f"{path} has neither Wan's names ({_ORIGINAL_MARK}) nor diffusers' ({_DIFFUSERS_MARK}): give a "
            "Wan transformer."
        )
    return renamed_by(convert_wan_transformer_to_diffusers, path, sources)
