"""Configs of causal Wan transformers in diffusers' terms, whoever wrote them. Light: nodes read the class names."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...checkpoints.checkpoint_error import CheckpointError, shown
from .config_bounds import check_transformer_words

# diffusers' own; FastVideo's and its relatives'; the makers' own training code, which has Wan's terms in its configs.
TRANSFORMER_CLASSES = (
    "WanTransformer3DModel",
    "CausalWanTransformer3DModel",
    "CausalWanModel",
    "CausalWanTransformer",
    "WanModel",
)
# What causal classes call the latent frames of a block: FastVideo's and the makers' word.
FRAMES_PER_BLOCK_KEYS = ("num_frames_per_block", "num_frame_per_block")
MOST_FRAMES_PER_BLOCK = 1000
# Wan's words for what diffusers' config says, from Wan's `wan/modules/model.py`.
_WANS_WORDS = {"num_heads": "num_attention_heads", "in_dim": "in_channels", "out_dim": "out_channels"}
# Width and width of the feed-forward layers to layers: 1.3B and 14B of Wan 2.1, 5B of Wan 2.2.
_LAYERS = {(1536, 8960): 30, (5120, 13824): 40, (3072, 14336): 30}


def diffusers_config(place: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """`config` in the words of diffusers' class; one that is in them comes back unchanged.

    Raises CheckpointError, which names `place`, for a value in Wan's words that cannot be.
    """
    if "num_attention_heads" in config or "num_heads" not in config:
        return dict(config)
    check_transformer_words(place, config)
    renamed = {_WANS_WORDS.get(key, key): value for key, value in config.items() if key != "qk_norm"}
    return {**renamed, "attention_head_dim": config.get("dim", 2048) // config["num_heads"]}


def frames_per_block(path: Path, config: Mapping[str, Any]) -> int | None:
    """Latent frames per block that the transformer in `path` was trained with; None if its config does not say.

    Raises:
        CheckpointError: the config says something other than a number from 1 on.
    """
    key = next((key for key in FRAMES_PER_BLOCK_KEYS if config.get(key) is not None), None)
    if key is None:
        return None
    frames = config[key]
    if type(frames) is not int or not 1 <= frames <= MOST_FRAMES_PER_BLOCK:
        raise CheckpointError(
            f"{path} has {key} {shown(frames)} in its config, allowed are whole numbers from 1 to "
            f"{MOST_FRAMES_PER_BLOCK}: correct the config, or download it again."
        )
    return frames


def published_layers(width: int, ffn_dim: int) -> int | None:
    """How many layers the published Wan transformer of these widths has; None where there is none."""
    return _LAYERS.get((width, ffn_dim))
