"""Saved streams with hostile headers, descriptions, layouts and names, and how the pack goes on from them."""

from __future__ import annotations

import hashlib
import json
import os
from collections import deque
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from types import MappingProxyType
from typing import Any

import streamblocks_path  # noqa: F401
import torch
from fuzz_mutations import change_bytes, change_json, change_text
from fuzz_target import Target, names

from streamblocks.stream.going_on import check_recipe, settings_to_go_on
from streamblocks.stream.prompt_track import PromptTrack
from streamblocks.stream.recipe import Recipe
from streamblocks.stream.run_point import RunPoint, SnapshotFileError, VideoMark
from streamblocks.stream.saved_folder import SavedFolder, saved_folders
from streamblocks.stream.saved_names import names_of_saved
from streamblocks.stream.saved_stream import SavedStream, describe_saved
from streamblocks.stream.settings import StreamSettings
from streamblocks.stream.snapshot import InputVideo, StreamSnapshot, VideoSoFar
from streamblocks.stream.snapshot_file import write_snapshot_file
from streamblocks.stream.snapshot_tree import TreeReader, TreeWriter
from streamblocks.wan.family import CAUSAL_WAN_21
from streamblocks.wan.transformer.kv_cache import DeferredBlock, KVCache
from streamblocks.wan.transformer.packed_kv_cache import PackedKVCache, Packing
from streamblocks.wan.vae.streaming_vae import DecoderCache, EncoderCache, LatentStatistics
from streamblocks.wan.vae.video_encoder import VideoEncoder

_CPU = torch.device("cpu")
_RECIPE = Recipe(model="/models/a", stamp="0a")
_NAME = "block_0000002.safetensors"
_PLACE = "\x01place\x01"
_BEFORE_SUM = b'{"__metadata__":{"sha256":"'


def _values() -> dict[str, Any]:
    """A state with something of every kind."""
    one = torch.zeros(1, 4, 1, 2, 2)
    sizes: dict[str, Any] = {"layers": 2, "heads": 1, "head_dim": 8, "tokens_per_frame": 2, "device": _CPU}
    cache = KVCache.allocate(**sizes, frames=3, dtype=torch.float32)
    packing = Packing(2, torch.int8)
    packed = PackedKVCache.allocate_packed(**sizes, frames=3, packing=packing, sink_frames=1, dtype=torch.float32)
    cache.length, packed.length = 4, 4
    cache.deferred = DeferredBlock(one, 3, "a cat", torch.zeros(1, 4, 8))
    statistics = LatentStatistics(one[..., :1, :1], one[..., :1, :1])
    return {
        "stream_position": 6,
        "current_denoised_latents": one,
        "frame_cache_context": deque([torch.zeros(1, 3, 1, 4, 4)], maxlen=9),
        "generator": torch.Generator(),
        "kv_cache": cache,
        "packed": packed,
        "decoder_cache": DecoderCache(statistics, [None, "Rep", one], 6, 6),
        "input_encoder": VideoEncoder(EncoderCache(statistics, [None, one], one, 6)),
        "numbers": [1.5, float("inf"), (True, None, {"a": 1, 2: "b"})],
    }


def saved_stream() -> SavedStream:
    """A good one."""
    writer = TreeWriter(_CPU)
    layout = writer.write(_values())
    point = RunPoint(
        2, 9, 21, 20, "0: a cat\n3: a dog", "linear", True, VideoMark(2, 1234, 21), "Recipe()", "3:5", "of a page", 1.5
    )
    past = StreamSnapshot(
        _RECIPE,
        StreamSettings(width=64, height=32, seed=2**63),
        2,
        "a cat",
        layout,
        MappingProxyType(writer.tensors),
        VideoSoFar(Path("video.mp4"), 16.0, 21),
        InputVideo("video a.mp4", 20, 16.0),
        1,
    )
    return SavedStream(past, point)


def seal(header: bytes, content: bytes) -> bytes:
    """A file of `header`, which begins as a saved stream's does, with the right checksum where there is a place."""
    header += b" " * (-len(header) % 8)
    place = len(_BEFORE_SUM)
    blank = header[:place] + b"0" * 64 + header[place + 64 :]
    digest = hashlib.sha256(len(header).to_bytes(8, "little") + blank + content).hexdigest()
    return len(header).to_bytes(8, "little") + header[:place] + digest.encode() + header[place + 64 :] + content


class WriteSaved:
    """Writes changed ones of a good saved stream; most with the right checksum."""

    def __init__(self) -> None:
        stream = saved_stream()
        with TemporaryDirectory() as place:
            path = Path(place) / _NAME
            write_snapshot_file(path, stream.snapshot.tensors, describe_saved(stream))
            self._whole = path.read_bytes()
        length = int.from_bytes(self._whole[:8], "little")
        self._tensors = json.loads(self._whole[8 : 8 + length])
        self._described = json.loads(self._tensors.pop("__metadata__")["streamblocks"])
        self._content = self._whole[8 + length :]

    def __call__(self, random: Random, folder: Path) -> None:
        """Write the input."""
        (folder / _NAME).write_bytes(self._changed(random))

    def _changed(self, random: Random) -> bytes:
        what, described = random.randrange(10), dict(self._described)
        tensors, text = json.dumps(self._tensors), json.dumps(described)
        if what == 0:
            return change_bytes(random, self._whole)
        if what in (1, 2):
            tensors = change_json(random, self._tensors)
        elif what == 3:
            text = change_json(random, described)
        elif what == 4:
            part = random.choice(("settings", "recipe", "point", "video", "input_video"))
            text = json.dumps({**described, part: _PLACE})
            text = text.replace(json.dumps(_PLACE), change_json(random, described[part]), 1)
        elif what == 5:
            point = dict(described["point"])
            point["track"] = change_text(random, point["track"])
            text = json.dumps({**described, "point": point})
        else:
            layout = change_json(random, json.loads(described["layout"]))
            text = json.dumps({**described, "layout": layout})
        inside = json.dumps(text) if random.randrange(50) else text
        header = _BEFORE_SUM + b"0" * 64 + b'","streamblocks":' + inside.encode("utf-8", "surrogatepass") + b"}"
        rest = tensors.encode("utf-8", "surrogatepass")[1:]
        content = self._content
        if random.randrange(20) == 0:
            content = change_bytes(random, content)
        return seal(header + (b"," if len(rest) > 1 and rest != b"}" else b"") + rest, content)


def _go_on(folder: Path) -> object:
    """Read the newest snapshot of `folder`, and do what samplers do with it before anything is loaded."""
    place = SavedFolder(folder)
    listed = place.point()
    saved, said = place.load()
    past, point = saved.snapshot, saved.point
    settings_to_go_on(past.lean(), StreamSettings(width=64, height=32))
    check_recipe(past, _RECIPE)
    if point is not None and point.track:
        PromptTrack.parse(point.track, point.interpolation).place(None, None)
    TreeReader(past.tensors, _CPU, CAUSAL_WAN_21.snapshot_kinds()).read(past.layout)
    return listed, said, past.position, past.keeps_keys


_FOLDERS = ("2026-01-01_00-00-00_abcd", "stream_00001", "a b", "ü", "\u202ea")


def _write_names(random: Random, folder: Path) -> None:
    """A folder of saved streams whose names, and those of what is in them, are not the pack's."""
    root = folder / "root"
    for path in sorted(root.rglob("*"), reverse=True) if root.exists() else ():
        path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()
    root.mkdir(exist_ok=True)
    for _ in range(random.choice((1, 2, 3))):
        name = change_bytes(random, random.choice(_FOLDERS).encode())
        name = name.replace(b"/", b"").replace(b"\0", b"")[:200]
        if name in (b"", b".", b".."):
            continue
        below = os.fsencode(root) + b"/" + name
        if os.path.lexists(below):
            continue
        Path(os.fsdecode(below)).mkdir()
        for _ in range(random.randrange(4)):
            _write_below(random, below)


def _write_below(random: Random, place: bytes) -> None:
    text = _NAME if random.randrange(2) else change_text(random, _NAME)
    name = text.encode("utf-8", "surrogatepass").replace(b"/", b"").replace(b"\0", b"")[:200]
    path = place + b"/" + name
    if name in (b"", b".", b"..") or os.path.lexists(path):
        return
    what = random.randrange(6)
    if what == 0:
        os.mkfifo(path)
    elif what == 1:
        target = random.choice((b"/dev/zero", b"nowhere", name, b"..", b"/"))
        Path(os.fsdecode(path)).symlink_to(os.fsdecode(target))
    elif what == 2:
        Path(os.fsdecode(path)).mkdir()
    else:
        Path(os.fsdecode(path)).write_bytes(random.choice((b"", b"\0" * 100, b"\xff" * 8, b"[" * 1000)))
        os.utime(path, (0, random.choice((0, -1, 10**9, 2**33))))


def _list_names(folder: Path) -> object:
    root = folder / "root"
    points = [one.point() for one in saved_folders(root)]
    for name in names_of_saved(root)[:1]:
        SavedFolder(root / name).load()
    return points


_clear = names("go_on_from", "the track", "interpolation is", kinds=(ValueError, SnapshotFileError))


def saved_targets() -> list[Target]:
    """Of streams on the disk."""
    return [
        Target("saved stream", 16, WriteSaved(), _go_on, _clear),
        Target("names of saved streams", 2, _write_names, _list_names, _clear),
    ]
