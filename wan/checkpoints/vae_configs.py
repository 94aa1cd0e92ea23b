"""Configs of Wan's VAEs: the published statistics of their latents, and what a config does not say."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan

from .config_bounds import check_vae_config

_DEFAULTS: Mapping[str, Any] = MappingProxyType(
    {name: p.default for name, p in inspect.signature(AutoencoderKLWan.__init__).parameters.items() if name != "self"}
)
# As published with Wan 2.2: `Wan2_2_VAE` in Wan's `wan/modules/vae2_2.py`, and the config in diffusers' layout.
# fmt: off
_WAN_22_MEAN = (
    -0.2289, -0.0052, -0.1323, -0.2339, -0.2799, 0.0174, 0.1838, 0.1557,
    -0.1382, 0.0542, 0.2813, 0.0891, 0.1570, -0.0098, 0.0375, -0.1825,
    -0.2246, -0.1207, -0.0698, 0.5109, 0.2665, -0.2108, -0.2158, 0.2502,
    -0.2055, -0.0322, 0.1109, 0.1567, -0.0729, 0.0899, -0.2799, -0.1230,
    -0.0313, -0.1649, 0.0117, 0.0723, -0.2839, -0.2083, -0.0520, 0.3748,
    0.0152, 0.1957, 0.1433, -0.2944, 0.3573, -0.0548, -0.1681, -0.0667,
)
_WAN_22_STD = (
    0.4765, 1.0364, 0.4514, 1.1677, 0.5313, 0.4990, 0.4818, 0.5013,
    0.8158, 1.0344, 0.5894, 1.0901, 0.6885, 0.6165, 0.8454, 0.4978,
    0.5759, 0.3523, 0.7135, 0.6804, 0.5833, 1.4146, 0.8986, 0.5659,
    0.7069, 0.5338, 0.4889, 0.4917, 0.4069, 0.4999, 0.6866, 0.4093,
    0.5709, 0.6065, 0.6415, 0.4944, 0.5726, 1.2042, 0.5458, 1.6887,
    0.3971, 1.0600, 0.3943, 0.5537, 0.5444, 0.4089, 0.7468, 0.7744,
)
# fmt: on
# Latent channels to mean and standard deviation; diffusers' class has those of Wan 2.1 as its defaults.
PUBLISHED_STATISTICS: Mapping[int, Mapping[str, list[float]]] = MappingProxyType(
    {
        16: {"latents_mean": _DEFAULTS["latents_mean"], "latents_std": _DEFAULTS["latents_std"]},
        48: {"latents_mean": list(_WAN_22_MEAN), "latents_std": list(_WAN_22_STD)},
    }
)


def checked_vae_config(place: Path, written: Mapping[str, Any]) -> dict[str, Any]:
    """`written`, complete; raises CheckpointError, which names `place`, for a value that cannot be."""
    check_vae_config(place, {**_DEFAULTS, **written})
    return complete_vae_config(written)


def complete_vae_config(written: Mapping[str, Any]) -> dict[str, Any]:
    """`written`, completed with the defaults of diffusers' class, and with scale factors that its sizes give."""
    config = {**_DEFAULTS, **written}
    scales = {
        "scale_factor_spatial": 2 ** (len(config["dim_mult"]) - 1) * (config["patch_size"] or 1),
        "scale_factor_temporal": 2 ** sum(config["temperal_downsample"]),
    }
    return {**config, **scales, **written}
