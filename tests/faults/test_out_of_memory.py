"""Memory that runs out at each stage in turn: the same pictures, or all blocks before it; and nothing stays behind."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from faulty_streams import FAILS_ONCE, STAYS_SHORT, RoomyCard, Watcher, make

from streamblocks.families.kv_policies import KV_AUTO, KV_INT8, KV_PLAIN
from streamblocks.stream import memory_fit
from streamblocks.stream.estimate import MemoryEstimate
from streamblocks.stream.materialise import materialise, release_materialised
from streamblocks.stream.memory_rungs import DECODING, FREED, KEYS, LAYERS, OTHER_PARTS
from streamblocks.stream.pipelines import BuiltInPipeline
from streamblocks.stream.recipe import Recipe
from streamblocks.stream.saved_folder import SavedFolder
from streamblocks.stream.settings import StreamSettings
from streamblocks.stream.sinks import Mp4Sink
from streamblocks.stream.stream_saver import StreamSaver
from streamblocks.wan.tiny_model import write_tiny_model

from fault_injection import ALWAYS, Alive, Fault, out_of_memory, struck


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    # As few layers as can be streamed.
    folder = write_tiny_model(tmp_path_factory.mktemp("deep"), layers=4)
    with pytest.MonkeyPatch.context() as patch:
        # A rehearsal takes longer than these streams, and is tested by itself.
        patch.setattr(memory_fit, "estimate_memory", lambda *_: MemoryEstimate(1, 1, 1, 1, 1))
        pipeline = materialise(Recipe(str(folder)), residency=RoomyCard())
        make(pipeline, "recompute", blocks=1)
        for stage in ("text_encoder", "denoise_block"):
            # Layers that were streamed come back packed, a little larger.
            strike(pipeline, "recompute", stage, ALWAYS, 9)
        make(pipeline, "recompute", blocks=1)
        yield pipeline
    release_materialised()


@pytest.fixture(scope="module")
def expected(pipeline):
    """Of each stream, made when it is first asked for."""
    made = {}

    def of(name):
        if name not in made:
            made[name] = make(pipeline, name).frames
        return made[name]

    return of


def strike(pipeline, name, stage, times, before):
    """A stream whose stage fails in block 2, or in the first if `before` is 0, and what it leaves behind."""
    fault = Fault(out_of_memory, times, armed=before == 0)

    def arm(index):
        fault.armed = True

    with struck(pipeline, stage, fault):
        made = make(pipeline, name, Watcher(after=arm))
    return made, fault.raised


@pytest.mark.parametrize(("name", "stage", "before"), FAILS_ONCE)
def test_memory_that_runs_out_once_costs_nothing_but_time(pipeline, expected, name, stage, before):
    frames = expected(name)
    made, raised = strike(pipeline, name, stage, 1, before)
    assert raised == 1 and made.report is not None and not made.report.ran_out
    assert [rung for *_, rung in made.rungs] == [FREED]
    assert any(f"ran out of memory at block {2 if before else 1} (" in notice for notice in made.report.notices)
    difference = (made.frames.int() - frames.int()).abs().max()
    # Where a pass of two blocks has evicted keys, what is left is made in two passes, which sum in another order.
    assert difference <= (1 if name == "fused" else 0)


@pytest.mark.parametrize(("name", "stage", "before"), STAYS_SHORT)
def test_memory_that_stays_short_costs_no_block_before(pipeline, expected, name, stage, before):
    frames = expected(name)
    before_it = Alive.now(pipeline)
    made, raised = strike(pipeline, name, stage, ALWAYS, before)
    # Each rung was followed by another try, and the last by the end.
    assert raised == len(made.rungs) + 1 and raised < 12
    if before:
        assert made.report is not None and made.report.blocks_made == 1 and made.report.ran_out
        assert torch.equal(made.frames, frames[:before])
        told = made.report.notices[-1]
        assert "ran out of memory at block 2: choose" in told and "the block before it is kept" in told
    else:
        assert isinstance(made.error, torch.OutOfMemoryError) and "at block 1: choose" in str(made.error)
    # The next stream works, with all layers back on the device, and nothing else stays.
    again = make(pipeline, name, blocks=1).frames
    assert torch.equal(again, frames[: len(again)])
    del made, again
    assert Alive.now(pipeline) == before_it


@pytest.mark.parametrize(("policy", "times"), [("rolling", 9), ("recompute", 4)])
def test_the_rungs_come_in_their_order(pipeline, expected, policy, times):
    """Decoding that needs less and less: each rung once it is of use, and pictures that differ as they say."""
    fault = Fault(out_of_memory, times)
    order = [FREED, OTHER_PARTS, DECODING, DECODING, DECODING, LAYERS, KEYS]
    with struck(pipeline, "decode", fault):
        made = make(pipeline, policy, Watcher(after=lambda index: setattr(fault, "armed", True)), kv_format=KV_AUTO)
    rungs = [rung for *_, rung in made.rungs]
    assert rungs == order[: len(rungs)] and made.report is not None
    if times > len(order):
        assert len(rungs) == len(order) and made.report.ran_out and made.report.blocks_made == 1
        assert made.report.settings.kv_format == KV_INT8 and made.report.settings.decoder_cache_in_ram
        return
    assert (made.report.settings.decode_bands, made.report.settings.kv_format) == (4, KV_PLAIN)
    assert any("in 4 bands of rows from there on" in notice for notice in made.report.notices)
    assert (made.frames.int() - expected(policy).int()).abs().max() <= 1


def test_keys_that_are_packed_on_the_way_are_those_of_a_stream_in_8_bits(pipeline, expected):
    """Up to the block that ran out the past was exact; the same rows of keys come out, packed."""
    fault = Fault(out_of_memory, 4)
    with struck(pipeline, "denoise_block", fault):
        made = make(pipeline, "rolling", Watcher(after=lambda index: setattr(fault, "armed", True)), kv_format=KV_AUTO)
    assert made.rungs[-1][2] == KEYS and made.report is not None and made.report.blocks_made == 3
    plain, packed = expected("rolling").int(), make(pipeline, "rolling", kv_format=KV_INT8).frames.int()
    seen = made.frames.int()
    assert torch.equal(seen[:9], plain[:9]) and not torch.equal(seen, plain)
    assert (seen - packed).abs().max() <= 3


@pytest.mark.parametrize("name", ["recompute", "rolling"])
def test_a_stream_that_ran_out_goes_on_from_what_was_saved_of_it(pipeline, expected, tmp_path, name):
    """Block 2 is made twice and saved once; all that is tried for block 3 leaves it what it was."""
    folder = SavedFolder(tmp_path / "saved")
    video = Mp4Sink(folder.video, fps=16, finish_at=tmp_path / "first.mp4")
    once, always = Fault(out_of_memory), Fault(out_of_memory, ALWAYS)

    def arm(index):
        once.armed, always.armed = True, index == 1

    # Every hundred blocks: the first one, and where the stream ends.
    saver = StreamSaver(folder, 100, video)
    with struck(pipeline, "decode", once), struck(pipeline, "denoise_block", always):
        made = make(pipeline, name, Watcher(after=arm), video, saver=saver, kv_format=KV_AUTO)
    assert once.raised == 1 and made.report is not None and made.report.ran_out and made.report.blocks_made == 2
    saved, _ = folder.load()
    assert saved.point is not None and saved.point.blocks == 2 and saver.notices == []
    # Freeing goes last, because it was all that helped block 2.
    assert [rung for *_, rung in made.rungs][-2:] == [KEYS, FREED] and saved.snapshot.settings.kv_format == KV_INT8
    whole = Mp4Sink(folder.video, fps=16, finish_at=tmp_path / "whole.mp4", resume=saved.point.video)
    with struck(pipeline, "start pictures", Fault(out_of_memory, armed=True)):
        rest = make(pipeline, name, None, whole, saved=saved, kv_format=KV_AUTO)
    # What was decoded before is decoded again, and that again.
    assert rest.rungs == [(2, "decode again", FREED)]
    assert rest.report is not None and rest.report.blocks_made == 3 and whole.frames_written == 33
    assert torch.equal(made.frames, expected(name)[:21])
    # Keys that are kept were packed; those made anew fit plain again.
    assert (rest.frames.int() - expected(name)[21:].int()).abs().max() <= (3 if name == "rolling" else 0)


def test_a_stream_that_ran_out_says_what_would_fit(tiny_folder, monkeypatch):
    pipeline = materialise(Recipe(str(tiny_folder)), residency=RoomyCard())
    assert isinstance(pipeline, BuiltInPipeline)
    monkeypatch.setattr(pipeline.fit, "estimate", lambda spec, settings: _Least(10**9 * settings.context_frames))
    settings = StreamSettings(width=64, height=64, context_frames=3)
    assert pipeline.saving.can_make_again
    # FP8 takes as much here, so it is not named.
    assert pipeline.what_would_fit(settings) == "FP8 with 2 context frames, which needs 2.0 GB"


@dataclass
class _Least:
    least: int
