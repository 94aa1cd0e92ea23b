"""Memory that runs out at each stage in turn: the same pictures, or all blocks before it; and nothing stays behind."""

from __future__ import annotations

import pytest
import torch
from faulty_streams import RoomyCard, Watcher, make

from streamblocks.stream import pipelines
from streamblocks.stream.estimate import MemoryEstimate
from streamblocks.stream.materialise import materialise, release_materialised
from streamblocks.stream.memory_rungs import FREED
from streamblocks.stream.recipe import Recipe
from streamblocks.wan.tiny_model import write_tiny_model

from fault_injection import ALWAYS, Alive, Fault, out_of_memory, struck

# Of each stage, a stream in which it runs, and the pictures before it where it fails in block 3.
STAGES = [
    ("recompute", "text_encoder", 21),
    ("recompute", "prepare_caches", 21),
    ("recompute", "refill_context", 21),
    ("recompute", "denoise_block", 21),
    ("recompute", "decode", 21),
    ("recompute", "pictures", 21),
    ("rolling", "denoise_block", 21),
    ("rolling", "remember_block", 21),
    ("rolling", "decode", 21),
    ("fused", "denoise_block", 21),
    ("fused", "decode", 21),
    ("video", "encode_input", 21),
    ("video", "denoise_block", 21),
    ("video", "decode", 21),
    ("start", "start pictures", 0),
    ("start", "loading", 0),
]


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    # As few layers as can be streamed.
    folder = write_tiny_model(tmp_path_factory.mktemp("deep"), layers=4)
    with pytest.MonkeyPatch.context() as patch:
        # A rehearsal takes longer than these streams, and is tested by itself.
        patch.setattr(pipelines, "estimate_memory", lambda *_: MemoryEstimate(1, 1, 1, 1, 1))
        pipeline = materialise(Recipe(str(folder)), residency=RoomyCard())
        make(pipeline, "recompute", blocks=1)
        for stage in ("text_encoder", "denoise_block"):
            # Layers that were streamed come back packed, a little larger.
            strike(pipeline, "recompute", stage, ALWAYS, 21)
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
    """A stream whose stage fails in block 3, or in the first if `before` is 0, and what it leaves behind."""
    fault = Fault(out_of_memory, times, armed=before == 0)

    def arm(index):
        fault.armed = index >= 1

    with struck(pipeline, stage, fault):
        made = make(pipeline, name, Watcher(after=arm))
    return made, fault.raised


@pytest.mark.parametrize(("name", "stage", "before"), STAGES)
def test_memory_that_runs_out_at_a_stage(pipeline, expected, name, stage, before):
    frames = expected(name)
    before_it = Alive.now(pipeline)
    once, raised = strike(pipeline, name, stage, 1, before)
    assert raised == 1 and once.report is not None
    # Freed, and made again: to the bit.
    assert torch.equal(once.frames, frames) and [rung for *_, rung in once.rungs] == [FREED]
    assert any(f"ran out of memory at block {3 if before else 1} (" in notice for notice in once.report.notices)
    always, raised = strike(pipeline, name, stage, ALWAYS, before)
    # Each rung was followed by another try, and the last by the end.
    assert raised == len(always.rungs) + 1 and raised < 12
    if before:
        assert always.report is not None and always.report.blocks_made == 2 and always.report.ran_out
        assert torch.equal(always.frames, frames[:before])
        told = always.report.notices[-1]
        assert "ran out of memory at block 3: choose" in told and "the 2 blocks before it are kept" in told
    else:
        assert isinstance(always.error, torch.OutOfMemoryError) and "at block 1: choose" in str(always.error)
    del once, always, frames
    # The next stream works, with all layers back on the device.
    assert torch.equal(make(pipeline, name, blocks=1).frames, expected(name)[: 12 if name == "start" else 9])
    assert Alive.now(pipeline) == before_it
