"""Snapshots on disk: whole, or named as damaged, whatever is in the file."""

from __future__ import annotations

import errno
import json
import os
import struct
from dataclasses import asdict, replace
from pathlib import Path
from types import MappingProxyType

import pytest
import safetensors.torch
import torch

from streamblocks.families.step_list import StepList
from streamblocks.memory.cleanup import CleanupPolicy
from streamblocks.stream import snapshot_file
from streamblocks.stream.recipe import Recipe
from streamblocks.stream.run_point import RunPoint, SnapshotFileError, VideoMark
from streamblocks.stream.saved_folder import SavedFolder, saved_folders
from streamblocks.stream.saved_names import names_of_saved
from streamblocks.stream.saved_stream import SavedStream, describe_saved, read_saved
from streamblocks.stream.settings import StreamSettings
from streamblocks.stream.snapshot import InputVideo, StreamSnapshot, VideoSoFar
from streamblocks.stream.snapshot_file import read_snapshot_file, read_text, write_snapshot_file

TENSORS = {
    "latents": torch.arange(24, dtype=torch.float32).view(1, 2, 3, 4),
    "keys": torch.ones(3, 5).to(torch.float8_e4m3fn),
    "noise": torch.tensor(7, dtype=torch.uint8),
    "half": torch.full((2,), 0.5, dtype=torch.bfloat16),
    "none": torch.empty(0, 4),
}
SETTINGS = StreamSettings(
    width=64,
    height=32,
    steps=2,
    timesteps=StepList.parse("", "raw: 1000, 500"),
    cleanup=CleanupPolicy.NEVER,
    seed=2**63,
)
POINT = RunPoint(
    blocks=2, planned=None, pictures=21, block_pictures=20, track="0: a cat", interpolation="linear", edited=True,
    video=VideoMark(2, 1234, 21), recipe="Recipe()", node="3:5", workflow="of a page", saved=1.5,
)  # fmt: skip


def saved(blocks=2, **changes):
    layout = {
        "stream_position": 6,
        "current_denoised_latents": {"tensor": "latents", "on_device": True},
        "pictures": {"deque": [{"tensor": "half", "on_device": False}], "length": 9},
        "generator": {"generator": "noise", "device": "cpu"},
    }
    snapshot = StreamSnapshot(
        Recipe(model="/models/a", stamp="0a"),
        SETTINGS,
        blocks,
        "a cat \u732b\n'\"",
        json.dumps(layout),
        MappingProxyType(TENSORS),
        VideoSoFar(Path("/elsewhere/video.mp4"), 16.0, 21),
        InputVideo("video a.mp4", 20, 16.0),
        1,
    )
    return SavedStream(replace(snapshot, **changes), replace(POINT, blocks=blocks))


def blocks_of(read):
    return read.point.blocks


def same(ours, theirs):
    return set(ours) == set(theirs) and all(
        ours[name].dtype == theirs[name].dtype
        and torch.equal(ours[name].view(-1).view(torch.uint8), theirs[name].view(-1).view(torch.uint8))
        and ours[name].shape == theirs[name].shape
        for name in ours
    )


def test_all_of_a_stream_comes_back(tmp_path):
    folder = SavedFolder(tmp_path / "a")
    written = saved()
    folder.save(written)
    (read, said), before = folder.load(), written.snapshot
    assert said == [] and read.point == POINT
    past = read.snapshot
    assert same(past.tensors, TENSORS)
    wanted = replace(before, tensors=past.tensors, video=VideoSoFar(folder.video, 16.0, 21))
    assert vars(past) == vars(wanted)
    # What others read of it.
    (file,) = folder.path.glob("*.safetensors")
    assert same(safetensors.torch.load_file(file), TENSORS)
    # No program's objects are in it.
    assert b"torch" not in file.read_bytes()
    assert list(folder.path.iterdir()) == [file]


def test_each_byte_of_a_file_counts(tmp_path):
    """A newest snapshot with any byte flipped is never taken: the one before is, and it is said."""
    folder = SavedFolder(tmp_path)
    folder.save(saved(1))
    newest = folder.save(saved(2))
    whole = bytearray(newest.read_bytes())
    for place in range(0, len(whole), 7):
        damaged = whole.copy()
        damaged[place] ^= 1 << place % 8
        newest.write_bytes(damaged)
        with pytest.raises(SnapshotFileError, match=r"block_0000002\.safetensors"):
            read_snapshot_file(newest)
    read, said = folder.load()
    assert blocks_of(read) == 1
    assert len(said) == 1 and said[0].endswith("The one before was taken.")
    newest.write_bytes(whole)
    assert blocks_of(folder.load()[0]) == 2


def test_half_written_files_are_named(tmp_path):
    folder = SavedFolder(tmp_path)
    newest = folder.save(saved(2))
    whole = newest.read_bytes()
    for length in (0, 4, 8, 100, len(whole) // 2, len(whole) - 1):
        newest.write_bytes(whole[:length])
        with pytest.raises(SnapshotFileError, match=r"no saved stream, or damaged|is damaged"):
            read_snapshot_file(newest)
    with pytest.raises(SnapshotFileError, match=r"has no snapshot to go on from: .* is damaged"):
        folder.load()
    assert folder.point() is None or folder.point() == POINT


def test_two_are_kept_and_listed_by_time(tmp_path):
    for number, name in enumerate(("b", "a", "c")):
        folder = SavedFolder(tmp_path / name)
        for blocks in (1, 2, 30):
            file = folder.save(saved(blocks))
        os.utime(file, (number + 10, number + 10))
        assert [path.name for path in folder.snapshots()] == ["block_0000030.safetensors", "block_0000002.safetensors"]
        os.utime(folder.snapshots()[1], (number, number))
    (tmp_path / "empty").mkdir()
    assert names_of_saved(tmp_path) == ["c", "a", "b"]
    assert [folder.path.name for folder in saved_folders(tmp_path)] == ["c", "a", "b"]
    assert names_of_saved(tmp_path / "nowhere") == []
    folder.discard()
    assert names_of_saved(tmp_path) == ["a", "b"]


def test_a_write_that_fails_leaves_what_was_there(tmp_path, monkeypatch):
    folder = SavedFolder(tmp_path)
    folder.save(saved(1))

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(snapshot_file.os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        folder.save(saved(2))
    assert [path.name for path in tmp_path.iterdir()] == ["block_0000001.safetensors"]
    assert blocks_of(folder.load()[0]) == 1


def hostile(header):
    return struct.pack("<Q", len(header)) + header


SUM = b'{"__metadata__":{"sha256":"' + b"0" * 64 + b'","streamblocks":"{}"}'


@pytest.mark.parametrize(
    "content",
    [
        struct.pack("<Q", 1 << 62),
        hostile(b"{}"),
        hostile(b"[" * 100_000),
        hostile(SUM + b',"a":' + b"[" * 100_000),
        hostile(SUM + b',"a":{"dtype":"F32","shape":[1099511627776],"data_offsets":[0,4398046511104]}}'),
        hostile(SUM + b',"a":{"dtype":"F32","shape":[-1],"data_offsets":[0,-4]}}'),
        hostile(SUM + b',"a":{"dtype":"F4","shape":[1],"data_offsets":[0,4]}}') + b"1234",
        hostile(SUM + b',"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]},"b":7}') + b"1234",
        hostile(SUM + b',"a":{"dtype":"U8","shape":[1.0],"data_offsets":[0,1]}}') + b"1",
        hostile(SUM.replace(b'"{}"', b"{}") + b"}"),
        hostile(SUM + b"}"),
        hostile(b"\xff" + SUM + b"}"),
    ],
    ids=range(12),
)
def test_files_of_strangers_are_one_sentence(tmp_path, content):
    file = tmp_path / "block_0000001.safetensors"
    file.write_bytes(content)
    for read in (read_snapshot_file, lambda path: SavedFolder(path.parent).load()):
        with pytest.raises(SnapshotFileError, match=r"block_0000001\.safetensors"):
            read(file)


def test_pipes_and_devices_are_not_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/zero"), tmp_path, tmp_path / "nothing"):
        with pytest.raises(SnapshotFileError, match=str(path)):
            read_text(path)


@pytest.mark.parametrize(
    ("keys", "value"),
    [
        (["version"], 2),
        (["recipe"], None),
        (["recipe", "model"], "../up"),
        (["recipe", "dtype"], ["float32"]),
        (["settings"], {"width": 1}),
        (["settings", "width"], "64"),
        (["settings", "steps"], 0),
        (["settings", "seed"], True),
        (["settings", "no_setting"], 1),
        (["settings", "timesteps"], "1, 2"),
        (["blocks_made"], -1),
        (["blocks_made"], 1 << 70),
        (["prompt"], None),
        (["layout"], "7"),
        (["layout"], "[" * 100_000),
        (["layout"], json.dumps({"a": {"tensor": "no such", "on_device": True}})),
        (["layout"], json.dumps({"a": {"deque": [], "length": -1}})),
        (["layout"], json.dumps({"a": {"dict": [[[], 1]]}})),
        (["layout"], json.dumps({"a": {"kind": "KVCache", "parts": [1]}})),
        (["video"], {"fps": "16", "pictures": 1}),
        (["input_video"], {"source": 1, "pictures": 1, "fps": 1}),
        (["point", "blocks"], 0),
        (["point", "video"], 7),
        (["point", "video", "bytes"], -1),
        (["point", "track"], 3),
        (["point", "more"], 3),
    ],
    ids=str,
)
def test_descriptions_of_strangers_are_one_sentence(tmp_path, keys, value):
    described = json.loads(describe_saved(saved()))
    place = described
    for key in keys[:-1]:
        place = place[key]
    place[keys[-1]] = value
    with pytest.raises(SnapshotFileError, match=r"a\.safetensors (is no saved stream|was written by another version)"):
        read_saved(tmp_path / "a.safetensors", json.dumps(described), TENSORS)


def test_what_a_file_cannot_hold_is_said(tmp_path):
    with pytest.raises(ValueError, match=r"odd is torch\.complex64, which a safetensors file cannot hold"):
        write_snapshot_file(tmp_path / "a", {"odd": torch.zeros(1, dtype=torch.complex64)}, "")
    with pytest.raises(ValueError, match="and a snapshot has 2000000 for it"):
        write_snapshot_file(tmp_path / "a", {}, "x" * 2_000_000)
    assert list(tmp_path.iterdir()) == []
    assert asdict(POINT)["video"]["bytes"] == 1234
