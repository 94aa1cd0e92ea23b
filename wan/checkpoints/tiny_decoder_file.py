"""A tiny decoder in one file, with its makers' names; its sizes are read off the shapes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict
from itertools import takewhile
from pathlib import Path

import torch

from ...checkpoints.checkpoint_files import CheckpointError
from ...checkpoints.quantization_plan import ComponentWeights
from ...checkpoints.row_sources import RowSource
from ...checkpoints.safetensors_reading import FileHeader
from ..vae.tiny_decoder import IMAGE_CHANNELS, TinyDecoderConfig

_PREFIX = "decoder."
_FIRST = "decoder.1.weight"
# A block's first convolution; blocks follow each other from index 3 on.
_BLOCK = "decoder.{}.conv.0.weight"
_FIRST_BLOCK = 3
_STAGES = 3
# Behind a stage's blocks come its enlargement, its growth in time and its narrowing convolution.
_AFTER_BLOCKS = 3
_MOST_CHANNELS, _MOST_WIDTH, _MOST_BLOCKS = 256, 1024, 16
_GROWTHS, _PATCHES = (1, 2), (1, 2, 4)
# A safetensors file may say which latents it reads; other files are known by their names.
LATENTS_FIELD, NORMALIZED, DENORMALIZED = "latents", "normalized", "denormalized"
_LIGHT_NAME, _PLAIN_NAMES = "lighttae", ("taew", "taehv")


def is_tiny_decoder(names: Mapping[str, RowSource]) -> bool:
    """Whether tensors of these names may be a tiny decoder."""
    return _FIRST in names and _BLOCK.format(_FIRST_BLOCK) in names


def recognise_tiny_decoder(path: Path, header: FileHeader) -> ComponentWeights:
    """Say which tiny decoder a file holds; its encoder, if it has one, is not taken.

    The config has the fields of `TinyDecoderConfig`.

    Args:
        path: of the file.
        header: of the file, one for which `is_tiny_decoder` holds.

    Raises:
        CheckpointError: it holds something else after all.
    """
    sources = {name: source for name, source in header.tensors.items() if name.startswith(_PREFIX)}
    return ComponentWeights(path, asdict(_read_config(path, sources, header)), sources)


def _read_config(path: Path, sources: Mapping[str, RowSource], header: FileHeader) -> TinyDecoderConfig:
    first, channels = _convolution(path, sources, _FIRST, 3)
    places = range(_FIRST_BLOCK, _FIRST_BLOCK + _MOST_BLOCKS)
    blocks = len(list(takewhile(lambda place: _BLOCK.format(place) in sources, places)))
    widths, growths, index = [first], [], _FIRST_BLOCK
    for _ in range(_STAGES):
        index += blocks + _AFTER_BLOCKS
        grown, width = _convolution(path, sources, f"decoder.{index - 2}.conv.weight", 1)
        growths.append(grown // max(1, width) if grown % max(1, width) == 0 else 0)
        widths.append(_convolution(path, sources, f"decoder.{index - 1}.weight", 3)[0])
    pixels, _ = _convolution(path, sources, f"decoder.{index + 1}.weight", 3)
    patch = math.isqrt(pixels // IMAGE_CHANNELS)
    allowed = (
        1 <= channels <= _MOST_CHANNELS
        and all(1 <= width <= _MOST_WIDTH for width in widths)
        and all(growth in _GROWTHS for growth in growths)
        and patch in _PATCHES
    )
    if not allowed:
        raise CheckpointError(
            f"{path} is a tiny decoder of {channels} latent channels, {widths} wide, that makes {growths} frames of "
            f"one and {pixels} channels of a picture: choose a file such as taew2_1.safetensors, which has 16, "
            "[256, 128, 64, 64], [1, 2, 2] and 3."
        )
    return TinyDecoderConfig(
        latent_channels=channels,
        widths=(widths[0], widths[1], widths[2], widths[3]),
        time_growth=(growths[0], growths[1], growths[2]),
        blocks_per_stage=blocks,
        patch_size=patch,
        takes_normalized=_takes_normalized(path, header, sources[_FIRST].dtype),
    )


def _convolution(path: Path, sources: Mapping[str, RowSource], name: str, side: int) -> tuple[int, int]:
    """Output and input channels of a convolution of `side` x `side`."""
    shape = tuple(sources[name].shape) if name in sources else ()
    if len(shape) != 4 or shape[2:] != (side, side):
        found = f"of shape {list(shape)}" if shape else "nowhere"
        raise CheckpointError(
            f"{path} has {name} {found}, where a tiny decoder has a convolution of {side}x{side}: choose a file such "
            "as taew2_1.safetensors."
        )
    return shape[0], shape[1]


def _takes_normalized(path: Path, header: FileHeader, dtype: torch.dtype) -> bool:
    """Which latents the file was trained on.

    TAEHV's files read what the transformer makes; LightTAE's, of the same names and shapes, read it with the VAE's
    mean and standard deviation applied. A file of another name goes by its dtype, as in ComfyUI: TAEHV's are float16.
    """
    said = header.metadata.get(LATENTS_FIELD)
    if said in (NORMALIZED, DENORMALIZED):
        return said == NORMALIZED
    name = path.name.lower()
    if _LIGHT_NAME in name:
        return False
    return any(plain in name for plain in _PLAIN_NAMES) or dtype == torch.float16
