"""What the configs of a Wan pipeline may say: several times what any published model has, and no more.

The classes of diffusers and transformers take any value, and then loop, allocate or fail with an error that names no
file. Each table has the names that are handed on; all else in a config is left out, so no option of a library that
nobody thought of here, such as where code for attention comes from, can be set by a file.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from ...checkpoints.config_values import FLAG, Allowed, Listed, OneOf, Optional, Real, Whole, check_config, config_error

# 14B has 40 heads of 128 channels; its rotary table has 1024 positions.
_TRANSFORMER: Mapping[str, Allowed] = MappingProxyType(
    {
        "patch_size": Listed(Whole(1, 8), 3, 3),
        "num_attention_heads": Whole(1, 128),
        "attention_head_dim": Whole(6, 256, step=2),
        "in_channels": Whole(1, 256),
        "out_channels": Whole(1, 256),
        "text_dim": Whole(1, 16384),
        "freq_dim": Whole(2, 8192, step=2),
        "ffn_dim": Whole(1, 65536),
        "num_layers": Whole(1, 256),
        "cross_attn_norm": FLAG,
        "qk_norm": OneOf(("rms_norm_across_heads", "rms_norm", True, None)),
        "eps": Real(0.0, 1.0),
        "image_dim": Optional(Whole(1, 16384)),
        "added_kv_proj_dim": Optional(Whole(1, 16384)),
        "rope_max_seq_len": Whole(1, 8192),
        "pos_embed_seq_len": Optional(Whole(1, 8192)),
    }
)
_WANS_WORDS: Mapping[str, Allowed] = MappingProxyType(
    {"dim": Whole(6, 16384), "num_heads": Whole(1, 128), "in_dim": Whole(1, 256), "out_dim": Whole(1, 256)}
)
_LARGEST_WIDTH = 16384
_STATISTICS = Listed(Real(-1e4, 1e4), 1, 256)
_VAE: Mapping[str, Allowed] = MappingProxyType(
    {
        "base_dim": Whole(1, 1024),
        "decoder_base_dim": Optional(Whole(1, 1024)),
        "z_dim": Whole(1, 256),
        "dim_mult": Listed(Whole(1, 16), 1, 6),
        "num_res_blocks": Whole(0, 8),
        "attn_scales": Listed(Real(0.0, 1e4), 0, 8),
        "temperal_downsample": Listed(FLAG, 0, 6),
        "dropout": Real(0.0, 1.0),
        "latents_mean": _STATISTICS,
        "latents_std": Listed(Real(1e-6, 1e4), 1, 256),
        "is_residual": FLAG,
        "in_channels": Whole(1, 64),
        "out_channels": Whole(1, 64),
        "patch_size": Optional(Whole(1, 8)),
        "scale_factor_temporal": Whole(1, 64),
        "scale_factor_spatial": Whole(1, 64),
    }
)
# umt5-xxl has 24 layers of 4096 channels.
_TEXT_ENCODER: Mapping[str, Allowed] = MappingProxyType(
    {
        "vocab_size": Whole(1, 2_000_000),
        "d_model": Whole(1, 16384),
        "d_kv": Whole(1, 1024),
        "d_ff": Whole(1, 65536),
        "num_layers": Whole(1, 128),
        "num_decoder_layers": Optional(Whole(0, 128)),
        "num_heads": Whole(1, 256),
        "relative_attention_num_buckets": Whole(4, 1024),
        "relative_attention_max_distance": Whole(2, 100_000),
        "dropout_rate": Real(0.0, 1.0),
        "layer_norm_epsilon": Real(0.0, 1.0),
        "initializer_factor": Real(0.0, 1e4),
        "feed_forward_proj": OneOf(("gated-gelu", "relu", "gelu", "gated-relu", "gated-silu")),
        "tie_word_embeddings": FLAG,
        "is_encoder_decoder": FLAG,
        "use_cache": FLAG,
        "pad_token_id": Optional(Whole(-1, 2_000_000)),
        "eos_token_id": Optional(Whole(-1, 2_000_000)),
        "decoder_start_token_id": Optional(Whole(-1, 2_000_000)),
        "classifier_dropout": Real(0.0, 1.0),
        "is_decoder": FLAG,
    }
)


def check_transformer_words(place: Path, config: Mapping[str, Any]) -> None:
    """Raise CheckpointError for values in Wan's own words, which diffusers' are computed from, that cannot be."""
    check_config(place, config, _WANS_WORDS)


def check_transformer_config(place: Path, config: Mapping[str, Any]) -> None:
    """Raise CheckpointError for a config, complete and in diffusers' words, that no transformer of Wan has."""
    check_config(place, config, _TRANSFORMER)
    heads, channels = config["num_attention_heads"], config["attention_head_dim"]
    if heads * channels > _LARGEST_WIDTH:
        raise config_error(place, f"{heads} heads of {channels} channels", f"up to {_LARGEST_WIDTH} in all")


def transformer_arguments(config: Mapping[str, Any]) -> dict[str, Any]:
    """What of a checked config the transformer's class takes."""
    return {name: value for name, value in config.items() if name in _TRANSFORMER}


def check_vae_config(place: Path, config: Mapping[str, Any]) -> None:
    """Raise CheckpointError for a complete config that no VAE of Wan has."""
    check_config(place, config, _VAE)
    for name in ("latents_mean", "latents_std"):
        if len(config[name]) != config["z_dim"]:
            raise config_error(place, f"{len(config[name])} {name}", f"{config['z_dim']}, one for each of z_dim")
    steps = len(config["dim_mult"]) - 1
    if len(config["temperal_downsample"]) != steps:
        found = len(config["temperal_downsample"])
        raise config_error(place, f"{found} temperal_downsample", f"{steps} beside its dim_mult")


def vae_arguments(config: Mapping[str, Any]) -> dict[str, Any]:
    """What of a checked config the VAE's class takes."""
    return {name: value for name, value in config.items() if name in _VAE}


def text_encoder_arguments(place: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """What of a config the text encoder's class takes; raises CheckpointError for a value that cannot be."""
    check_config(place, config, _TEXT_ENCODER)
    # JSON's 0 and 1 may mean 0.0 and 1.0, which transformers' class tells apart.
    return {
        name: float(value) if isinstance(_TEXT_ENCODER[name], Real) else value
        for name, value in config.items()
        if name in _TEXT_ENCODER
    }
