"""Wan's VAE in one file, with Wan's own names or diffusers'; its sizes are read off the shapes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers

from ...checkpoints.checkpoint_files import CheckpointError
from ...checkpoints.checkpoint_reading import read_checkpoint
from ...checkpoints.quantization_plan import ComponentWeights
from ...checkpoints.row_sources import RowSource
from .all_in_one import VAE_NAMES, take_part
from .renaming import renamed_by
from .residual_vae_names import RESIDUAL_MARK, from_residual_names
from .vae_configs import PUBLISHED_STATISTICS, checked_vae_config

_ORIGINAL_MARKS = ("decoder.head.0.gamma", "conv2.weight")
_DIFFUSERS_MARKS = ("decoder.norm_out.gamma", "post_quant_conv.weight")
# In diffusers' names: the residual blocks of Wan 2.2's VAE have one upsampler, the blocks of 2.1's a list of them.
_DIFFUSERS_RESIDUAL_MARK = "decoder.up_blocks.0.upsampler.resample.1.weight"
# What the sizes are read off, in diffusers' names, with the number of dimensions.
_SIZED = {
    "decoder.norm_out.gamma": 4,
    "post_quant_conv.weight": 5,
    "encoder.conv_in.weight": 5,
    "decoder.conv_out.weight": 5,
}
_COLOURS = 3


def recognise_vae_file(path: Path) -> ComponentWeights:
    """Read the header of `path` and say which VAE of Wan it holds.

    The config has what the names and shapes say, and the published mean and standard deviation of as many latent
    channels. All else is a default of diffusers' class, which holds for Wan 2.1 and 2.2.

    Raises:
        CheckpointError: the file cannot be read, or holds something else.
    """
    sources = _diffusers_names(path, take_part(path, read_checkpoint(path).tensors, VAE_NAMES)[1])
    decoder_dim, channels, (base_dim, in_channels), out_channels = _read_sizes(path, sources)
    if channels not in PUBLISHED_STATISTICS:
        raise CheckpointError(
            f"{path} gives {channels} latent channels, and mean and standard deviation are known for "
            f"{' and '.join(map(str, PUBLISHED_STATISTICS))}: give a diffusers folder, whose config.json has them."
        )
    patch = math.isqrt(in_channels // _COLOURS)
    if not in_channels == out_channels == _COLOURS * patch**2:
        raise CheckpointError(
            f"{path} takes pictures of {in_channels} channels and gives {out_channels}: give a VAE of Wan, which has 3 "
            "of both, or 12 where it joins 2 x 2 pixels."
        )
    config = {
        "base_dim": base_dim,
        "decoder_base_dim": decoder_dim,
        "z_dim": channels,
        "is_residual": _DIFFUSERS_RESIDUAL_MARK in sources,
        "in_channels": in_channels,
        "out_channels": out_channels,
        "patch_size": patch if patch > 1 else None,
        **PUBLISHED_STATISTICS[channels],
    }
    return ComponentWeights(path, checked_vae_config(path, config), sources)


def _read_sizes(path: Path, sources: Mapping[str, RowSource]) -> tuple[int, int, tuple[int, int], int]:
    """Width of the decoder's last layer, latent channels, (width, channels) of the encoder's first, output channels."""
    for name, dimensions in _SIZED.items():
        if name not in sources:
            raise CheckpointError(f"{path} lacks {name}, which Wan's VAE has: give the complete file.")
        shape = sources[name].shape
        if len(shape) != dimensions:
            raise CheckpointError(
                f"{path} has {name} of shape {list(shape)}, where Wan's VAE has {dimensions} dimensions: give a VAE of "
                "Wan."
            )
    norm, latent, first, last = (sources[name].shape for name in _SIZED)
    return norm[0], latent[0], (first[0], first[1]), last[0]


def _diffusers_names(path: Path, stored: Mapping[str, RowSource]) -> dict[str, RowSource]:
    if all(mark in stored for mark in _DIFFUSERS_MARKS):
        return dict(stored)
    if not all(mark in stored for mark in _ORIGINAL_MARKS):
        raise CheckpointError(
            f"{path} holds no VAE of Wan ({_ORIGINAL_MARKS[0]} is absent): choose a file such as "
            "wan_2.1_vae.safetensors or wan2.2_vae.safetensors."
        )
    if any(name.startswith(RESIDUAL_MARK) for name in stored):
        return {from_residual_names(name): source for name, source in stored.items()}
    renamed = renamed_by(convert_wan_vae_to_diffusers, path, stored)
    return {name: stored[original] for name, original in renamed.items()}
