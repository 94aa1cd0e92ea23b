"""What of a stream lies on the disk: a snapshot, and where its run stood; to JSON text and back."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from ..families.step_list import StepList
from ..memory.cleanup import CleanupPolicy
from .recipe import Recipe
from .run_point import (
    VERSION,
    RunPoint,
    parse_description,
    plain_count,
    plain_number,
    plain_record,
    plain_text,
    point_of,
    reading,
)
from .settings import StreamSettings
from .snapshot import InputVideo, StreamSnapshot, VideoSoFar
from .snapshot_layout import check_layout

# Beside its snapshots; a file says no path, which could be anybody's.
VIDEO = "video.mp4"
# What a stream that goes on is compared by, and nothing that loads: see `check_recipe`.
_OF_RECIPE = (
    "model", "components", "revision", "blocks", "dtype", "device", "stamp", "vae", "text_encoder", "weights",
    "tokenizer", "decoder",
)  # fmt: skip
# What files of earlier versions lack: None, as they were made without.
_SINCE = frozenset({"decoder"})
_STEP_LISTS = ("timesteps", "first_block_timesteps")


@dataclass(frozen=True)
class SavedStream:
    """A snapshot that lies on the disk.

    Attributes:
        snapshot: of the stream.
        point: where its run stood; None for a stream that was saved at its end.
    """

    snapshot: StreamSnapshot
    point: RunPoint | None


def describe_saved(saved: SavedStream) -> str:
    """All of it but the tensors, as JSON text."""
    past = saved.snapshot
    return json.dumps(
        {
            "version": VERSION,
            "recipe": {name: getattr(past.recipe, name) for name in _OF_RECIPE},
            "settings": past.settings.as_dict(),
            "blocks_made": past.blocks_made,
            "scene_began": past.scene_began,
            "prompt": past.prompt,
            "layout": past.layout,
            "video": None if past.video is None else {"fps": past.video.fps, "pictures": past.video.pictures},
            "input_video": None if past.input_video is None else asdict(past.input_video),
            "point": None if saved.point is None else asdict(saved.point),
        },
        allow_nan=False,
    )


def read_saved(path: Path, text: str, tensors: Mapping[str, torch.Tensor]) -> SavedStream:
    """The stream that `describe_saved` described; the tensors are taken over.

    Raises:
        SnapshotFileError: `text` of the file `path` describes none.
    """
    described = parse_description(path, text)
    return reading(
        path, lambda: SavedStream(_snapshot(described, tensors, path.parent / VIDEO), point_of(described["point"]))
    )


def _snapshot(described: Mapping[str, Any], tensors: Mapping[str, torch.Tensor], file: Path) -> StreamSnapshot:
    layout = plain_text(described["layout"])
    check_layout(layout, tensors)
    video, input_video = described["video"], described["input_video"]
    return StreamSnapshot(
        _recipe(described["recipe"]),
        _settings(described["settings"]),
        plain_count(described["blocks_made"]),
        plain_text(described["prompt"]),
        layout,
        MappingProxyType(dict(tensors)),
        None if video is None else VideoSoFar(file, plain_number(video["fps"]), plain_count(video["pictures"])),
        None
        if input_video is None
        else InputVideo(
            plain_text(input_video["source"]), plain_count(input_video["pictures"]), plain_number(input_video["fps"])
        ),
        plain_count(described["scene_began"]),
    )


def _recipe(values: Mapping[str, Any]) -> Recipe:
    given = {name: values[name] for name in _OF_RECIPE if name in values or name not in _SINCE}
    return Recipe(**plain_record(Recipe, given))


def _settings(values: Mapping[str, Any]) -> StreamSettings:
    given = dict(values)
    lists: dict[str, Any] = {name: StepList.parse(name, plain_text(given.pop(name) or "")) for name in _STEP_LISTS}
    cleanup = CleanupPolicy(given.pop("cleanup"))
    plain = plain_record(StreamSettings, given)
    # As one: a list and the number of steps are checked together.
    return replace(StreamSettings(), **plain, **lists, cleanup=cleanup)
