"""Which preset a checkpoint is streamed with, by its name, its size and what its configs say."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ...checkpoints.checkpoint_error import CheckpointError, shown
from ...checkpoints.json_text import read_json
from ...checkpoints.quantization_plan import ComponentWeights
from ...families.kv_policies import ROLLING
from ...families.stream_preset import StreamPreset
from .transformer_configs import frames_per_block

SETTINGS_FILE = "streaming.json"
# As the training code of these models calls them in a transformer's config.
_MOST_FRAMES = 10_000
_WINDOW_KEY, _SINK_KEY = "local_attn_size", "sink_size"


def choose_preset(
    presets: Sequence[StreamPreset], by_width: Mapping[int, StreamPreset], weights: ComponentWeights
) -> StreamPreset:
    """The preset of a transformer.

    Args:
        presets: of its family; the first one where nothing says which.
        by_width: for transformers of these widths whose names say nothing.
        weights: of the transformer.

    Raises:
        CheckpointError: a config or the model's `streaming.json` has a value that cannot be.
    """
    config = weights.config
    width = config["num_attention_heads"] * config["attention_head_dim"]
    named = (preset for preset in presets if preset.is_published_as(weights.path))
    preset = _with_config(next(named, by_width.get(width, presets[0])), config, weights.path)
    own = weights.path / SETTINGS_FILE
    if not own.exists():
        return preset
    try:
        return preset.changed(read_json(own), str(own))
    except ValueError as error:
        raise CheckpointError(str(error)) from error


def _with_config(preset: StreamPreset, config: Mapping[str, Any], path: Path) -> StreamPreset:
    """The preset with the block, window and sink of the transformer's config, where it has them."""
    frames = frames_per_block(path, config) or preset.frames_per_block
    # The makers' window includes the block; -1 is one without bounds.
    window = config.get(_WINDOW_KEY) or -1
    sink = config.get(_SINK_KEY) or 0
    if type(window) is not int or type(sink) is not int or not 0 <= sink <= _MOST_FRAMES or window > _MOST_FRAMES:
        raise CheckpointError(
            f"{path} has {_WINDOW_KEY} {shown(window)} and {_SINK_KEY} {shown(sink)} in its config, allowed are whole "
            f"numbers up to {_MOST_FRAMES}: "
            "correct the config, or download it again."
        )
    if frames == preset.frames_per_block and window <= frames:
        return preset
    # Another block in the same window.
    context = max(1, preset.context_frames + preset.frames_per_block - frames)
    if preset.kv_policy != ROLLING:
        context = preset.context_frames
    if window > frames:
        context = window - frames
    return replace(preset, frames_per_block=frames, context_frames=context, sink_frames=min(sink, context))
