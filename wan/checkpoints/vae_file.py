"""Wan's VAE in one safetensors file, with Wan's own names or diffusers'; its sizes are read off the shapes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers

from ...checkpoints.checkpoint_files import CheckpointError
from ...checkpoints.checkpoint_reading import read_checkpoint
from ...checkpoints.quantization_plan import ComponentWeights
from ...checkpoints.row_sources import RowSource
from .all_in_one import VAE_NAMES, take_part

_ORIGINAL_MARKS = ("decoder.head.0.gamma", "conv2.weight")
_DIFFUSERS_MARKS = ("decoder.norm_out.gamma", "post_quant_conv.weight")


def recognise_vae_file(path: Path) -> ComponentWeights:
    """Read the header of `path` and say which VAE of Wan it holds.

    The config has what differs between such VAEs: `base_dim` and `z_dim`. All else, mean and standard deviation of the
    latents among it, is a default of diffusers' class, as published with Wan 2.1.

    Raises:
        CheckpointError: the file cannot be read, or holds something else.
    """
    sources = _diffusers_names(path, take_part(path, read_checkpoint(path).tensors, VAE_NAMES)[1])
    norm, convolution = (sources[mark].shape for mark in _DIFFUSERS_MARKS)
    if len(norm) != 4 or len(convolution) != 5:
        raise CheckpointError(
            f"{path} has {_DIFFUSERS_MARKS[0]} of shape {list(norm)} and {_DIFFUSERS_MARKS[1]} of {list(convolution)}, "
            "where Wan's VAE has 4 and 5 dimensions: give a VAE of Wan."
        )
    return ComponentWeights(path, {"base_dim": norm[0], "z_dim": convolution[0]}, sources)


def _diffusers_names(path: Path, stored: Mapping[str, RowSource]) -> dict[str, RowSource]:
    if all(mark in stored for mark in _DIFFUSERS_MARKS):
        return dict(stored)
    if not all(mark in stored for mark in _ORIGINAL_MARKS):
        raise CheckpointError(
            f"{path} holds no VAE of Wan ({_ORIGINAL_MARKS[0]} is absent): choose a file such as "
            "wan_2.1_vae.safetensors."
        )
    # diffusers' renaming only moves values from key to key, so names can stand in for tensors.
    renamed: dict[str, str] = convert_wan_vae_to_diffusers({name: name for name in stored})
    return {name: stored[original] for name, original in renamed.items()}
