"""A stream that was saved and ended in the midst of a block goes on as if it had never stopped."""

from __future__ import annotations

import errno
import itertools
import shutil
import threading
from dataclasses import replace
from fractions import Fraction
from typing import Any

import av
import pytest
import torch
from file_streams import Nobody, Pictures

from streamblocks.stream import saved_folder, snapshot_writing
from streamblocks.stream.direction import Direction
from streamblocks.stream.live_control import Edit, LiveControl
from streamblocks.stream.materialise import materialise
from streamblocks.stream.picture_sources import PictureBatch
from streamblocks.stream.prompt_track import PromptTrack
from streamblocks.stream.recipe import Recipe
from streamblocks.stream.run_stream import run_stream
from streamblocks.stream.saved_folder import SavedFolder
from streamblocks.stream.session import Session
from streamblocks.stream.settings import StreamSettings
from streamblocks.stream.sinks import Mp4Sink
from streamblocks.stream.start_pictures import StartPictures
from streamblocks.stream.steering import Steering
from streamblocks.stream.stream_saver import StreamSaver
from streamblocks.stream.video_input import VideoInput
from streamblocks.wan.vae.stream_decoder import StreamDecoder

from small_wan import make_components

# Long enough that the decoder's cache is made anew of latents that do not reach back to the first.
LONG, SHORT = 15, 5
TRACK = "0: a cat\n2->3: a dog on a red sofa\n4 bias 0.5: a cat :0.5 || a dog :0.5"


class StoppedError(RuntimeError):
    pass


class StopsInBlock(Nobody):
    """Ends the stream in the second pass of a block."""

    def __init__(self, block):
        super().__init__()
        self.block, self.made = block, 0

    def before_pass(self, index):
        if index == 1 and self.made == self.block:
            raise StoppedError

    def after_block(self, block):
        self.made = block.index + 1


@pytest.fixture(scope="module")
def recipe(tiny_folder):
    return Recipe(model=str(tiny_folder))


def small(policy, blocks):
    window: dict[str, Any] = {"sink_frames": 1, "context_frames": 4} if policy == "rolling" else {}
    return StreamSettings(width=32, height=32, steps=2, seed=7, blocks=blocks, kv_policy=policy, **window)


def clip():
    """A moving picture at another rate than the stream's, shorter than it."""
    picture = torch.rand((1, 32, 32, 3), generator=torch.Generator().manual_seed(0))
    batch = torch.cat([picture.roll(shift, dims=2) for shift in range(25)])
    return VideoInput(PictureBatch("video", batch, Fraction(12)), Fraction(16), 0.7)


def planned(*, video, start=None, track=TRACK):
    placed = PromptTrack.parse(track).place(None, None)
    return Direction.of("", None, placed, None, start, clip() if video else None)


def begin(recipe, settings, direction, folder, stop, every=100, steering=None):
    """A stream that ends in block `stop`, counted from 0; returns its blocks."""
    pictures, sink = Pictures(), Mp4Sink(folder.video, finish_at=folder.path.parent / "plain.mp4")
    watcher = StopsInBlock(stop)
    saver = StreamSaver(folder, every, sink, node="3")
    with pytest.raises(StoppedError):
        run_stream(materialise(recipe), settings, direction, [sink, pictures], watcher, saver=saver, steering=steering)
    return pictures.blocks, saver


def go_on(recipe, settings, folder, *, video=False):
    """The rest of it; returns its blocks, its report, its file, and the block that it went on behind."""
    saved, said = folder.load()
    point = saved.point
    pictures = Pictures()
    sink = Mp4Sink(folder.video, finish_at=folder.path.parent / "whole.mp4", resume=point.video)
    track = PromptTrack.parse(point.track, point.interpolation).place(None, None)
    direction = Direction.of("", None, track, saved.snapshot, None, clip() if video else None)
    report = run_stream(
        materialise(recipe), settings, direction, [sink, pictures], Nobody(), resume=point, keep_stream=True
    )
    return pictures.blocks, report, sink.path, point, said


def times(file):
    with av.open(str(file)) as container:
        return [frame.pts for frame in container.decode(video=0)]


def is_whole(file, pictures):
    """As many pictures, with nothing between them, twice or missing."""
    shown = times(file)
    return len(shown) == pictures and len({b - a for a, b in itertools.pairwise(shown)}) == 1


def uncut(recipe, settings, direction):
    pictures = Pictures()
    report = run_stream(materialise(recipe), settings, direction, [pictures], Nobody(), keep_stream=True)
    return pictures.blocks, report


def equal(ours, theirs):
    return len(ours) == len(theirs) and all(map(torch.equal, ours, theirs))


class CopiesFolder(Pictures):
    """Keeps the folder as it was before some blocks: what a process that is killed then leaves."""

    def __init__(self, folder, blocks):
        super().__init__()
        self.folder, self.copied = folder, blocks

    def write(self, frames):
        if len(self.blocks) in self.copied:
            shutil.copytree(self.folder.path, self.folder.path.with_name(str(len(self.blocks))))
        super().write(frames)


@pytest.mark.parametrize("policy", ["recompute", "rolling"])
def test_a_long_stream_goes_on_bit_for_bit(recipe, tmp_path, policy):
    """At its first blocks, and where these have left what is kept for the decoder."""
    settings, folder = small(policy, LONG), SavedFolder(tmp_path / "saved")
    sink = Mp4Sink(folder.video, finish_at=tmp_path / "plain.mp4")
    # Behind the sink of the file, which is then a block ahead of the snapshot.
    whole = CopiesFolder(folder, (1, LONG - 1))
    report = run_stream(
        materialise(recipe),
        settings,
        planned(video=False),
        [sink, whole],
        Nobody(),
        keep_stream=True,
        saver=StreamSaver(folder, LONG - 1, sink),
    )
    for made in (1, LONG - 1):
        killed = SavedFolder(tmp_path / str(made))
        blocks = LONG if made > 1 else 2
        later, again, file, point, said = go_on(recipe, replace(settings, blocks=blocks), killed)
        assert point.blocks == made and said == [] and equal(later, whole.blocks[made:blocks])
        assert is_whole(file, 9 + 12 * (blocks - 1)) and again.blocks_made == blocks
    assert again.pictures == report.pictures
    assert report.snapshot is not None
    kept, wanted = again.snapshot.lean(), report.snapshot.lean()
    assert kept.layout == wanted.layout
    assert equal([kept.tensors[name] for name in wanted.tensors], list(wanted.tensors.values()))


@pytest.mark.parametrize("policy", ["recompute", "rolling"])
def test_a_stream_from_a_video_with_edits_goes_on_bit_for_bit(recipe, tmp_path, policy):
    """Saved two blocks before it ended: these are made a second time, and are in the file once."""
    settings = small(policy, SHORT)

    def steered():
        control = LiveControl()

        def after_block_0(index, _):
            if index == 0:
                control.edit(Edit(prompt="a bird", strength=0.9))

        return Steering(control, tell=after_block_0)

    whole = Pictures()
    run_stream(materialise(recipe), settings, planned(video=True), [whole], Nobody(), steering=steered())
    folder = SavedFolder(tmp_path / "saved")
    first, saver = begin(recipe, settings, planned(video=True), folder, 4, every=3, steering=steered())
    # With an input video, the encoder's cache moves on in the block that fails.
    assert saver.notices == [] and [path.name[6:13] for path in folder.snapshots()] == ["0000003", "0000001"]
    later, report, file, point, _ = go_on(recipe, settings, folder, video=True)
    assert point.blocks == 3 and point.edited and report.by_hand
    assert equal(first[:3] + later, whole.blocks) and equal(first, whole.blocks[:4])
    assert is_whole(file, 9 + 12 * (SHORT - 1))


def test_a_stream_with_a_start_and_a_cut_goes_on_bit_for_bit(recipe, tmp_path):
    start = StartPictures(PictureBatch("start", torch.rand((1, 32, 32, 3))), Fraction(16))
    settings = small("recompute", SHORT)
    direction = planned(video=False, start=start, track="0: a cat\n3 cut: a dog")
    whole, wanted = uncut(recipe, settings, direction)
    for stop in (1, 3, 4):
        folder = SavedFolder(tmp_path / str(stop))
        first, _ = begin(recipe, settings, direction, folder, stop, every=1)
        later, report, file, point, _ = go_on(recipe, settings, folder)
        assert point.blocks == stop and equal(first + later, whole)
        assert report.pictures == wanted.pictures == sum(map(len, whole)) and is_whole(file, report.pictures)


def test_nothing_is_left_to_make(recipe, tmp_path):
    """Killed behind the last block: what lies behind the save is dropped, and the file is finished."""
    folder, settings = SavedFolder(tmp_path / "saved"), small("recompute", 3)
    begin(recipe, settings, planned(video=False), folder, 2, every=1)
    with folder.video.open("ab") as file:
        file.write(b"half a fragment")
    later, report, file, _, _ = go_on(recipe, replace(settings, blocks=2), folder)
    assert later == [] and is_whole(file, 21)
    assert (report.blocks_made, report.pictures, report.snapshot.blocks_made) == (2, 21, 2)


def test_a_video_that_is_not_what_it_was_is_named(recipe, tmp_path):
    folder, settings = SavedFolder(tmp_path / "saved"), small("recompute", 3)
    begin(recipe, settings, planned(video=False), folder, 2, every=1)
    whole = folder.video.read_bytes()
    wrong = {
        whole[:-1]: "has .* bytes and had .* when the stream was saved",
        bytes(len(whole)): "is another one than when the stream was saved",
        b"": "has 0 bytes and had .* when the stream was saved",
    }
    for content, sentence in wrong.items():
        folder.video.write_bytes(content)
        with pytest.raises(OSError, match=rf"video\.mp4, the video of the stream so far, {sentence}: go on from"):
            go_on(recipe, settings, folder)
        assert folder.video.read_bytes() == content
    folder.video.unlink()
    with pytest.raises(FileNotFoundError, match="the video of the stream so far, is gone: go on from the saved"):
        go_on(recipe, settings, folder)
    folder.video.write_bytes(whole + whole[:1000])
    assert is_whole(go_on(recipe, settings, folder)[2], 33)


def test_a_file_that_goes_is_noticed_at_the_next_block(tmp_path):
    frames = torch.zeros((4, 32, 32, 3), dtype=torch.uint8)
    for spoil in (lambda path: path.unlink(), lambda path: path.write_bytes(b"")):
        sink = Mp4Sink(tmp_path / "a.mp4")
        sink.write(frames)
        spoil(sink.path)
        with pytest.raises(OSError, match=r"a\.mp4 (was deleted while the stream went on|has 0 bytes and the stream)"):
            sink.write(frames)
        with pytest.raises(OSError, match=r"a\.mp4 (was deleted while the stream went on|has 0 bytes and the stream)"):
            sink.close()
        sink.path.unlink(missing_ok=True)


def test_a_full_disk_is_said_once_and_the_stream_goes_on(recipe, tmp_path, monkeypatch):
    folder, pictures = SavedFolder(tmp_path / "saved"), Pictures()
    sink = Mp4Sink(folder.video, finish_at=tmp_path / "plain.mp4")
    asked = []

    def full(path, *_):
        asked.append(path.name)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(saved_folder, "write_snapshot_file", full)
    saver = StreamSaver(folder, 1, sink)
    report = run_stream(
        materialise(recipe), small("recompute", 3), planned(video=False), [sink, pictures], Nobody(), saver=saver
    )
    assert len(asked) == 3 and len(pictures.blocks) == 3 and is_whole(sink.path, 33)
    (notice,) = [notice for notice in report.notices if "saved" in notice]
    assert notice.startswith("The stream could not be saved, first behind block 1 ([Errno 28] No space left on device")


def test_a_large_save_is_written_while_the_stream_goes_on(recipe, tmp_path, monkeypatch):
    """Behind block 1, it is on the disk only behind block 3; the one of a finished stream is given up."""
    monkeypatch.setattr(snapshot_writing, "LARGE_BYTES", 0)
    goes, begun = threading.Event(), threading.Event()
    write = saved_folder.write_snapshot_file

    def slowly(path, tensors, text, check):
        begun.set()
        assert goes.wait(60)
        write(path, tensors, text, check)

    monkeypatch.setattr(saved_folder, "write_snapshot_file", slowly)
    settings, folder = small("rolling", SHORT), SavedFolder(tmp_path / "saved")
    sink, pictures = Mp4Sink(folder.video, finish_at=tmp_path / "plain.mp4"), Pictures()
    saver = StreamSaver(folder, 1, sink)

    class Looks(Nobody):
        def after_block(self, block):
            if block.index == 0:
                assert begun.wait(60)
            if block.index == 2:
                assert saver.saved_blocks == 0 and not list(folder.path.glob("block_*"))
                goes.set()
                saver._writing.wait()
                shutil.copytree(folder.path, tmp_path / "killed")
                goes.clear()
                begun.clear()
            if block.index == SHORT - 1:
                # Given up at its first piece.
                saver._writing._abandoned.set()
                goes.set()

    direction = planned(video=False)
    run_stream(materialise(recipe), settings, direction, [sink, pictures], Looks(), saver=saver)
    assert [path.name for path in folder.path.iterdir() if "block" in path.name] == ["block_0000001.safetensors"]
    assert saver.notices == [] and saver.saved_blocks == 1
    later, _, file, point, _ = go_on(recipe, settings, SavedFolder(tmp_path / "killed"))
    assert point.blocks == 1 and equal(later, pictures.blocks[1:]) and is_whole(file, 9 + 12 * (SHORT - 1))


def test_latents_decoded_again_leave_the_decoder_as_it_was():
    """And one fewer does not, but for what is kept for the first frame's sake."""
    _, vae = make_components()
    decoder = StreamDecoder(vae)
    reach = decoder.reach
    latents = torch.randn((1, 16, reach + 3, 2, 2), generator=torch.Generator().manual_seed(0))
    whole = decoder.decode_again(latents).features
    assert equal(decoder.decode_again(latents[:, :, -reach:]).features, whole)
    assert not equal(decoder.decode_again(latents[:, :, 3 - reach :]).features, whole)


def test_a_snapshot_is_megabytes(recipe):
    """Lean, it has no features of the decoder: its size does not depend on the decoder's width."""
    with Session(materialise(recipe), small("recompute", 2), keeps_latents=True) as session:
        session.run_block("a cat")
        whole, lean = session.snapshot(), session.snapshot(lean=True)
    assert lean.bytes < whole.bytes / 4
    assert whole.lean().layout == lean.layout and whole.lean().bytes == lean.bytes
    assert not any(name.startswith("decoder_cache") for name in lean.tensors)
