"""CUDA graphs in streams, by a stand-in that records on a CPU: what is recorded when, who may, what stays."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from faulty_streams import RoomyCard
from recorded_calls import StandIn, enlarge
from test_live_block import NEW, Page, stream
from test_steered_streams import place

from streamblocks.families.kv_policies import KV_AUTO, KV_INT8
from streamblocks.ops.call_graphs import CallGraphs
from streamblocks.ops.graph_switch import SWITCH_VARIABLE, why_no_graphs
from streamblocks.stream import built_in_saving, memory_fit
from streamblocks.stream.direction import Direction
from streamblocks.stream.estimate import MemoryEstimate
from streamblocks.stream.materialise import materialise, release_materialised
from streamblocks.stream.recipe import Recipe
from streamblocks.stream.settings import StreamSettings
from streamblocks.wan.transformer.installed_attention import causal_attention_of
from streamblocks.wan.vae import stream_decoder

import small_wan
from fault_injection import Fault, out_of_memory, struck

CARD = 10**12
# What a block of one latent frame comes to: the context's pass, the steps, and in the fourth block the picture.
BLOCKS = 4


@pytest.fixture
def recorder():
    return StandIn()


@pytest.fixture(scope="module")
def plain(tiny_folder):
    # One that another file left there would be taken as it is.
    release_materialised()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory_fit, "estimate_memory", lambda *_: MemoryEstimate(1, 1, 1, 1, 1))
        yield materialise(Recipe(str(tiny_folder)), residency=RoomyCard())
    release_materialised()


@pytest.fixture
def pipeline(plain, recorder, monkeypatch):
    """On a device where nothing forbids graphs."""
    monkeypatch.setattr(built_in_saving, "why_no_graphs", lambda device: "")
    monkeypatch.setattr(plain.saving, "graphs", CallGraphs(recorder=recorder))
    return plain


STEADY: dict[str, tuple[dict[str, Any], list[int]]] = {
    # The context's pass and the steps, then the encoder: it has work from the third block on.
    "recompute": ({"kv_policy": "recompute"}, [0, 0, 2, 3]),
    "recompute, fused": ({"kv_policy": "recompute", "fuse_context": True}, [0, 0, 2, 3]),
    # The steps and the clean pass, once the window has its full length.
    "rolling": ({"kv_policy": "rolling", "context_frames": 6, "sink_frames": 3}, [0, 0, 0, 2]),
    # The steps, and the first one with the block before, which sees a window of its own.
    "rolling, fused": ({"kv_policy": "rolling", "context_frames": 6, "fuse_context": True}, [0, 0, 0, 1, 2]),
}


@pytest.mark.parametrize("case", STEADY.values(), ids=STEADY)
def test_all_is_recorded_early_and_nothing_after_it(case, recorder, monkeypatch):
    settings, expected = case
    monkeypatch.setattr(small_wan, "CHANGED_AT", 99)

    monkeypatch.setattr(stream_decoder, "decode_latent_frame", enlarge)
    pipe = small_wan.make_pipeline(small_wan.make_components())
    causal_attention_of(pipe.transformer).graphs = CallGraphs(recorder=recorder)
    seen: list[tuple[int, int]] = []
    small_wan.stream(
        pipe,
        lambda index: seen.append((recorder.recorded, recorder.replays)),
        blocks=12,
        **settings,
        height=16,
        width=16,
    )
    seen.append((recorder.recorded, recorder.replays))
    recorded, replays = zip(*seen[1:], strict=True)
    assert list(recorded) == expected + [expected[-1]] * (12 - len(expected))
    # From then on every pass is repeated: three steps with or without another pass, and the picture.
    passes = 3 + (not settings.get("fuse_context")) + (settings["kv_policy"] == "recompute")
    assert [after - before for before, after in zip(replays[-3:], replays[-2:], strict=False)] == [passes] * 2


def test_a_stream_by_graphs_has_the_same_pictures_and_leaves_nothing(pipeline, recorder):
    _, made = stream(pipeline, blocks=BLOCKS)
    assert recorder.recorded == 3 and recorder.alive == 0 and pipeline.saving.repeats_passes
    assert pipeline.describe()["cuda_graphs"] == "on"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(built_in_saving, "why_no_graphs", lambda device: "not here")
        _, launched = stream(pipeline, blocks=BLOCKS)
    assert torch.equal(made, launched) and recorder.recorded == 3
    assert pipeline.describe()["cuda_graphs"] == "not here"


def test_a_cancelled_stream_leaves_nothing(pipeline, recorder):
    class Cancelling(Page):
        def before_pass(self, index):
            super().before_pass(index)
            if recorder.recorded == 2:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stream(pipeline, Cancelling(watches=False), blocks=BLOCKS)
    assert recorder.recorded == 2 and recorder.alive == 0
    assert "forward" not in vars(pipeline.pipe.transformer)


def test_memory_that_runs_out_ends_graphs_for_the_stream(pipeline, recorder):
    """And not for the next one."""
    fault = Fault(out_of_memory)
    alive: list[int] = []

    class Watching(Page):
        def after_block(self, block):
            alive.append(recorder.alive)
            fault.armed = block.index == 2

    with struck(pipeline, "denoise_block", fault):
        report, _ = stream(pipeline, Watching(watches=False), blocks=5)
    assert fault.raised == 1 and any("memory was freed" in notice for notice in report.notices)
    assert alive == [0, 0, 4, 0, 0] and recorder.recorded == 3
    assert not pipeline.saving.repeats_passes and "ran out" in pipeline.describe()["cuda_graphs"]
    stream(pipeline, blocks=3)
    assert recorder.recorded == 5 and recorder.alive == 0


def test_weights_that_leave_take_the_graphs_along(pipeline, recorder):
    """As when ComfyUI needs the room for the text encoder, or another model."""
    alive: list[int] = []

    class Moving(Page):
        def after_block(self, block):
            if block.index == 2:
                alive.append(recorder.alive)
                for parameter in pipeline.pipe.transformer.parameters():
                    parameter.data = parameter.data.clone()

        def before_pass(self, index):
            super().before_pass(index)
            alive.append(recorder.alive)

    stream(pipeline, Moving(watches=False), blocks=BLOCKS)
    # The first pass of the fourth block finds them moved; its picture had been recorded by then.
    assert max(alive) == 6 and alive[-1] == 0 and recorder.recorded == 3 and recorder.alive == 0


def test_an_edit_begins_its_block_again_before_a_pass(pipeline, recorder):
    hooked: list[Any] = []

    class Looking(Page):
        def before_pass(self, index):
            super().before_pass(index)
            hooked.extend(block for block in pipeline.pipe.transformer.blocks if block._forward_pre_hooks)

    page = Looking({(3, 1): NEW})
    report, edited = stream(pipeline, page, blocks=5)
    assert page.steering.begun_again == 1 and page.told == [0, 1, 2, 3, 3, 4] and not hooked
    # The pass behind the one in which the edit comes is not begun: two were for nothing.
    assert [page.passes[block] for block in range(5)] == [2, 3, 3, 5, 3]
    assert pipeline.saving.repeats_passes and recorder.recorded == 3
    track = place(report.direction.as_track().written(), 5)
    _, replayed = stream(pipeline, direction=Direction.of("", track=track), blocks=5)
    assert torch.equal(edited, replayed) and recorder.alive == 0


TIGHT = {
    "no room": (MemoryEstimate(1, 1, 1, 1, CARD // 2), {}, False),
    "room": (MemoryEstimate(1, 1, 1, 1, CARD // 3), {}, True),
    "memory_gb": (MemoryEstimate(1, 1, 1, 1, 1), {"memory_gb": 8.0}, False),
    "8 bits": (MemoryEstimate(1, 1, 1, 1, 1), {"kv_format": KV_INT8}, False),
    "8 bits if need be": (MemoryEstimate(1, 1, 1, 1, 1), {"kv_format": KV_AUTO}, True),
}


@pytest.mark.parametrize("case", TIGHT.values(), ids=TIGHT)
def test_a_plan_without_room_has_no_graphs(pipeline, monkeypatch, case):
    estimate, changes, expected = case
    monkeypatch.setattr(pipeline.fit, "estimate", lambda *_: estimate)
    pipeline.check_fit(StreamSettings(32, 32, **changes))
    assert pipeline.saving.repeats_passes == expected
    asked = pipeline.saving.working_bytes(estimate)
    assert asked == estimate.streaming * (2 if expected else 1)


def test_the_switch_and_the_device_decide(monkeypatch, caplog):
    cuda = torch.device("cuda")
    assert "this is cpu" in why_no_graphs(torch.device("cpu"))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_allocator_backend", lambda: "native")
    assert why_no_graphs(cuda) == ""
    monkeypatch.setenv(SWITCH_VARIABLE, "OFF")
    assert SWITCH_VARIABLE in why_no_graphs(cuda)
    monkeypatch.setattr(torch.cuda, "get_allocator_backend", lambda: "cudaMallocAsync")
    monkeypatch.delenv(SWITCH_VARIABLE)
    assert "--disable-cuda-malloc" in why_no_graphs(cuda)
    assert not caplog.records
    # Recording there ends the process.
    monkeypatch.setenv(SWITCH_VARIABLE, "on")
    assert "--disable-cuda-malloc" in why_no_graphs(cuda) and "the only value is off" in caplog.text


def test_weights_that_are_brought_exchanged_or_released_take_the_graphs_along(pipeline, recorder):
    ways = (
        lambda: pipeline.bring_components(StreamSettings(32, 32)),
        lambda: pipeline.change_loras(pipeline.recipe),
        pipeline.release,
    )
    for number, leave in enumerate(ways, 1):
        for _ in range(2):
            pipeline.saving.graphs.begin_turn()
            pipeline.saving.graphs.call("key", [], [torch.ones(1)], lambda given: given + 1)
        assert recorder.recorded == number and recorder.alive
        leave()
        assert recorder.alive == 0
