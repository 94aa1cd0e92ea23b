"""Where one run of a stream stood, as JSON values from a file that may hold anything."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

from ..checkpoints.checkpoint_error import first_line, shown
from ..checkpoints.json_text import load_object

VERSION = 1
_Read = TypeVar("_Read")


class SnapshotFileError(ValueError):
    """A file is not a snapshot, or not whole."""

    # Programs that show errors to users put the module before the name, unless it is this one.
    __module__ = "builtins"


@dataclass(frozen=True)
class VideoMark:
    """A growing mp4 behind one of its blocks.

    Attributes:
        fragments: in it.
        bytes: of the file.
        pictures: in it.
    """

    fragments: int
    bytes: int
    pictures: int


@dataclass(frozen=True)
class RunPoint:
    """Where one run of a stream stood.

    Attributes:
        blocks: of the run that were made.
        planned: how many it was to have; None for one without end.
        pictures: that it had shown.
        block_pictures: of these, those that blocks made; the others were given.
        track: what it followed, edits included, as a prompt track's text; empty where a track can say nothing of it.
        interpolation: of that track.
        edited: whether somebody had changed it meanwhile.
        video: of its file.
        recipe: all of its pipeline's recipe, as text.
        node: the execution id of the sampler's node; "" outside of a prompt.
        workflow: the page's id of the workflow; "" outside of a page.
        saved: seconds since 1970.
        asked: what the prompt asked for, as text of whoever ran it; "" where nobody said.
    """

    blocks: int
    planned: int | None
    pictures: int
    block_pictures: int
    track: str
    interpolation: str
    edited: bool
    video: VideoMark
    recipe: str
    node: str
    workflow: str
    saved: float
    asked: str = ""


def read_point(path: Path, text: str) -> RunPoint | None:
    """Where the run stood; None for a stream that was saved at its end.

    Raises:
        SnapshotFileError: `text` of the file `path` does not say.
    """
    described = parse_description(path, text)
    return reading(path, lambda: point_of(described["point"]))


def parse_description(path: Path, text: str) -> dict[str, Any]:
    """The description in `text`, of the file `path`; raises SnapshotFileError where it is none of this version."""
    try:
        described = load_object(text)
    except ValueError as error:
        raise SnapshotFileError(f"{path} is damaged: its description is no JSON ({first_line(error)}).") from error
    if described.get("version") != VERSION:
        raise SnapshotFileError(
            f"{path} was written by another version of StreamBlocks (this one reads version {VERSION}): finish the "
            "stream with the version that wrote it."
        )
    return described


def reading(path: Path, read: Callable[[], _Read]) -> _Read:
    """What `read` makes of the description of the file `path`; its errors become a SnapshotFileError."""
    try:
        return read()
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError) as error:
        raise SnapshotFileError(
            f"{path} is no saved stream: its description cannot be read ({first_line(error)})."
        ) from error


def point_of(values: Any) -> RunPoint | None:  # noqa: ANN401
    """A `RunPoint` of JSON values; raises TypeError, KeyError or ValueError for others."""
    if values is None:
        return None
    given = dict(values)
    mark = VideoMark(**{name: plain_count(given["video"][name]) for name in ("fragments", "bytes", "pictures")})
    planned = given.pop("planned")
    saved = plain_number(given.pop("saved"))
    del given["video"]
    for name in ("blocks", "pictures", "block_pictures"):
        plain_count(given[name])
    point = RunPoint(
        **plain_record(RunPoint, given),
        planned=None if planned is None else plain_count(planned),
        saved=saved,
        video=mark,
    )
    if point.blocks < 1:
        raise ValueError("a run without blocks")
    return point


_TYPES: Mapping[str, tuple[type, ...]] = {
    "str": (str,),
    "str | None": (str, type(None)),
    "int": (int,),
    "bool": (bool,),
    "float": (int, float),
}


def plain_record(kind: Any, given: Mapping[str, Any]) -> dict[str, Any]:  # noqa: ANN401
    """`given` as arguments of a dataclass of plain values; raises TypeError for others."""
    known = {one.name: str(one.type) for one in fields(kind)}
    for name, value in given.items():
        if name not in known or type(value) not in _TYPES[known[name]]:
            raise TypeError(f"{shown(name)} is {shown(value)}")
    return dict(given)


def plain_text(value: Any) -> str:  # noqa: ANN401
    """`value`, if it is a text; raises TypeError for others."""
    if not isinstance(value, str):
        raise TypeError(f"{shown(value)} is no text")
    return value


def plain_count(value: Any) -> int:  # noqa: ANN401
    """`value`, if it is a whole number that things are counted by; raises TypeError for others."""
    if type(value) is not int or not 0 <= value < 1 << 60:
        raise TypeError(f"{shown(value)} is no number of things")
    return value


def plain_number(value: Any) -> float:  # noqa: ANN401
    """`value`, if it is a number of 0 or more; raises TypeError for others."""
    if type(value) not in (int, float) or not 0 <= value < 1e18:
        raise TypeError(f"{shown(value)} is no number")
    return float(value)
