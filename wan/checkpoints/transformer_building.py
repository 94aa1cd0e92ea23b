"""diffusers' Wan transformer from a config, and what a checkpoint of it must hold."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from diffusers.models.transformers.transformer_wan import WanTransformer3DModel

from ...checkpoints.component import explaining_config, shapes_only
from ...checkpoints.layer_numbers import check_layer_count
from ...checkpoints.module_loading import NOTHING_JOINED, check_slots
from ...checkpoints.module_slots import find_slots
from ...checkpoints.row_sources import RowSource
from .config_bounds import transformer_arguments
from .transformer_configs import FRAMES_PER_BLOCK_KEYS

_FIRST_LAYER = "blocks.0."


def build_transformer(config: Mapping[str, Any]) -> WanTransformer3DModel:
    """The transformer of `config`; of entries that diffusers' class does not take, its config keeps frames per block.

    So a file that is written from the loaded transformer has them too.
    """
    model: WanTransformer3DModel = WanTransformer3DModel.from_config(transformer_arguments(config))
    model.register_to_config(**{key: config[key] for key in FRAMES_PER_BLOCK_KEYS if key in config})
    return model


def check_complete(path: Path, config: Mapping[str, Any], sources: Mapping[str, RowSource]) -> None:
    """Raise CheckpointError unless `sources` are the tensors of the transformer of `config`, from headers only.

    One layer is built, and stands for all: they are alike. `config` has passed `check_transformer_config`.
    """
    check_layer_count(path, "num_layers", config["num_layers"], sources, "blocks.")
    with shapes_only(), explaining_config(path):
        module = build_transformer({**config, "num_layers": 1})
    slots = {}
    for name, slot in find_slots(module, {}, NOTHING_JOINED).items():
        layers = range(config["num_layers"]) if name.startswith(_FIRST_LAYER) else (0,)
        for layer in layers:
            target = name.replace(_FIRST_LAYER, f"blocks.{layer}.", 1)
            slots[target] = replace(slot, target=target)
    check_slots(slots, sources)
