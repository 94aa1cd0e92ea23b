"""Cancels, full disks, files that cannot be read, two streams at once, and a start anew after each."""

from __future__ import annotations

import errno
from pathlib import Path

import av
import pytest
import torch
from faulty_streams import CANCELLED, SETTINGS, Watcher, make

from streamblocks.checkpoints import safetensors_reading
from streamblocks.memory.tensor_bytes import live_tensor_bytes
from streamblocks.stream import sinks
from streamblocks.stream.materialise import materialise, release_materialised
from streamblocks.stream.recipe import Recipe
from streamblocks.stream.session import Session
from streamblocks.stream.sinks import Mp4Sink

from fault_injection import Alive, Fault, struck


class Cancelled(BaseException):
    """As ComfyUI's own: not an `Exception`."""


@pytest.fixture(scope="module")
def recipe(tiny_folder):
    return Recipe(str(tiny_folder))


@pytest.fixture(scope="module")
def pipeline(recipe):
    pipeline = materialise(recipe)
    make(pipeline, "recompute", blocks=1)
    yield pipeline
    release_materialised()


@pytest.fixture(scope="module")
def first_block(pipeline):
    return make(pipeline, "recompute", blocks=1).frames


def full() -> OSError:
    return OSError(errno.ENOSPC, "No space left on device")


def decoded(path):
    with av.open(str(path)) as container:
        return sum(1 for _ in container.decode(video=0))


@pytest.mark.parametrize(("name", "stage", "before"), CANCELLED)
def test_a_cancel_at_a_stage_keeps_what_was_made(pipeline, first_block, tmp_path, name, stage, before):
    held = Alive.now(pipeline)
    fault = Fault(Cancelled, armed=before == 0)
    video = Mp4Sink(tmp_path / "a.mp4")
    watcher = Watcher(after=lambda index: setattr(fault, "armed", True))
    with struck(pipeline, stage, fault):
        made = make(pipeline, name, watcher, sink=video)
    assert fault.raised == 1 and isinstance(made.error, Cancelled) and made.rungs == []
    assert video.frames_written == before and (decoded(video.path) if before else 0) == before
    del made, video
    assert Alive.now(pipeline) == held
    assert torch.equal(make(pipeline, "recompute", blocks=1).frames, first_block)


@pytest.mark.parametrize(("write", "kept"), [(1, 0), (3, 21)])
def test_a_disk_that_is_full_at_a_write_keeps_the_blocks_before(pipeline, tmp_path, monkeypatch, write, kept):
    held, opens = Alive.now(pipeline), 0
    open_path = Path.open

    class Full:
        """Half of what is written fits."""

        def __init__(self, file):
            self._file, self._writes = file, 0

        def __getattr__(self, name):
            return getattr(self._file, name)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self._file.close()

        def write(self, data):
            self._writes += 1
            if self._writes > 1:
                raise full()
            return self._file.write(data[: len(data) // 2])

    def open_file(path, mode="r", *rest, **named):
        nonlocal opens
        file = open_path(path, mode, *rest, **named)
        if path.suffix == ".mp4" and mode in ("r+b", "wb"):
            opens += 1
            return Full(file) if opens >= write else file
        return file

    monkeypatch.setattr(Path, "open", open_file)
    video = Mp4Sink(tmp_path / "a.mp4")
    made = make(pipeline, "recompute", sink=video)
    monkeypatch.undo()
    assert (
        isinstance(made.error, OSError)
        and made.error.errno == errno.ENOSPC
        and f"the {kept} pictures" in str(made.error)
    )
    assert (decoded(video.path) if kept else 0) == kept
    del made, video
    assert Alive.now(pipeline) == held


def test_a_disk_that_is_full_at_the_end_costs_the_index_only(pipeline, tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise full()

    monkeypatch.setattr(sinks, "remux_mp4", refuse)
    made = make(pipeline, "recompute", sink=Mp4Sink(tmp_path / "a.mp4"))
    assert made.report is not None and any("holds all 33 pictures" in notice for notice in made.report.notices)
    assert decoded(tmp_path / "a.mp4") == 33


def test_a_file_that_cannot_be_read_is_read_again_by_the_next_stream(recipe, monkeypatch):
    """In the transformer or the VAE: part of it is loaded then."""
    release_materialised()
    held, done = live_tensor_bytes(), 0
    read_into = safetensors_reading.read_into

    def read_or_fail(*arguments):
        nonlocal done
        done += 1
        if done == 40:
            raise OSError(errno.EIO, "Input/output error")
        return read_into(*arguments)

    monkeypatch.setattr(safetensors_reading, "read_into", read_or_fail)
    pipeline = materialise(recipe)
    made = make(pipeline, "recompute")
    assert isinstance(made.error, OSError) and made.error.errno == errno.EIO and made.frames is None
    again = make(pipeline, "recompute", blocks=1)
    assert again.report is not None
    release_materialised()
    del pipeline, made
    assert live_tensor_bytes() == held + again.frames.nbytes


def test_two_streams_at_once_are_each_alone(recipe):
    """Block by block in turns, also where another pipeline takes the place of theirs meanwhile."""
    pipeline = materialise(recipe)
    alone = make(pipeline, "recompute").frames
    with Session(pipeline, SETTINGS) as one, Session(pipeline, SETTINGS) as other:
        made = []
        for index in range(3):
            made.append(one.run_block(f"a cat {index}").frames)
            if index == 0:
                other.run_block("a dog")
            if index == 1:
                materialise(Recipe(recipe.model, dtype="bfloat16"))
        assert torch.equal(torch.cat(made), alone)
    release_materialised()


def test_a_start_anew_after_a_fault_is_the_first(recipe, first_block):
    pipeline = materialise(recipe)
    fault = Fault(Cancelled, armed=True)
    make(pipeline, "recompute", blocks=1)
    with struck(pipeline, "decode", fault):
        assert isinstance(make(pipeline, "recompute").error, Cancelled)
    release_materialised()
    assert torch.equal(make(materialise(recipe), "recompute", blocks=1).frames, first_block)
    release_materialised()
