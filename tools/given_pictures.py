"""Pictures that a command line gives to the sampler: files, through the nodes that load them on the page, too."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

SAMPLER = "StreamBlocksSampler"

VIDEO_SUFFIXES = frozenset({".mp4", ".webm", ".mkv", ".mov", ".avi", ".gif"})


class LoadVideo:
    """ComfyUI's node of this name, for a host that has none: a file of the input folder as VIDEO."""

    FUNCTION = "load"
    CATEGORY = "video"
    RETURN_TYPES = ("VIDEO",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802
        """See ComfyUI."""
        return {"required": {"file": ("STRING", {})}}

    def load(self, file: str) -> tuple[object]:
        """The video; it is opened by whoever reads it."""
        import folder_paths

        return (_FileVideo(folder_paths.get_annotated_filepath(file)),)


class _FileVideo:
    def __init__(self, path: str) -> None:
        self._path = path

    def get_stream_source(self) -> str:
        return self._path


def insert_pictures(prompt: dict[str, dict[str, Any]], files: Mapping[str, Path], inputs: Path) -> None:
    """Load files and connect them to every sampler of an API-format `prompt`.

    Args:
        prompt: is changed.
        files: by the sampler's input, "start" or "video".
        inputs: the host's input folder, which gets copies.

    Raises:
        ValueError: a file is not there, or the workflow has no sampler.
    """
    samplers = [node for node in prompt.values() if node["class_type"] == SAMPLER]
    for key, path in files.items():
        flag = "--start-image" if key == "start" else f"--{key}"
        if not path.is_file():
            raise ValueError(f"{flag} is {str(path)!r}, which is not a file: give the path of one.")
        if not samplers:
            raise ValueError(f"The workflow has no {SAMPLER}, so {flag} cannot be used.")
        is_video = key == "video" or path.suffix.lower() in VIDEO_SUFFIXES
        name = f"{key}{path.suffix.lower()}"
        shutil.copyfile(path, inputs / name)
        loader, slot = ("LoadVideo", "file") if is_video else ("LoadImage", "image")
        node_id = str(1 + max((int(number) for number in prompt if number.isdecimal()), default=0))
        prompt[node_id] = {"inputs": {slot: name}, "class_type": loader, "_meta": {"title": loader}}
        for sampler in samplers:
            sampler["inputs"][key] = [node_id, 0]
