"""Calls repeated by a graph: when one is recorded, what it reads, when it is dropped. No GPU: a stand-in records."""

import logging
from dataclasses import replace
from typing import Any

import pytest
import torch
from emulated_flash3 import emulated_flash3
from recorded_calls import StandIn, enlarge

from streamblocks.families.kv_policies import KV_INT8
from streamblocks.ops.attention_backends import FLASH3_FP8
from streamblocks.ops.call_graphs import CallGraphs
from streamblocks.wan.steps.context_policies import Past, Recompute
from streamblocks.wan.transformer.attention import CausalAttention
from streamblocks.wan.transformer.installed_attention import causal_attention_of
from streamblocks.wan.vae import stream_decoder
from streamblocks.wan.vae.streaming_vae import LatentStatistics

from small_wan import make_components, make_pipeline, make_state, run_steps, stream


@pytest.fixture
def graphs():
    return CallGraphs(recorder=StandIn())


def test_a_call_is_recorded_once_it_comes_in_another_turn(graphs):
    seen, weight = [], torch.tensor([2.0])

    def double(given):
        seen.append(given)
        return given * weight

    for number in range(5):
        # Two calls in the first turn.
        if number > 1:
            graphs.begin_turn()
        given = torch.tensor([float(number)])
        made = graphs.call("double", [weight], [given], double)
        assert made.tolist() == [2.0 * number]
        assert graphs.recorded == (number >= 2) and graphs.recorder.replays == max(0, number - 1)
    # From then on by the same input, and with a result of its own.
    assert len({id(given) for given in seen[2:]}) == 1
    kept = graphs.call("double", [weight], [torch.tensor([7.0])], double)
    weight.fill_(3.0)
    assert graphs.call("double", [weight], [torch.tensor([1.0])], double).tolist() == [3.0] and kept.tolist() == [14.0]


def test_tensors_that_moved_drop_the_graph(graphs):
    weight = torch.ones(1)
    for _ in range(2):
        for key in ("key", "another"):
            graphs.call(key, [weight], [weight], lambda given: given + weight)
        graphs.begin_turn()
    # A recorder that has nothing left begins anew.
    assert graphs.recorded == 2 and graphs.recorder.alive == 4 and graphs.recorder.forgotten == 1
    moved = torch.ones(1)
    graphs.call("key", [moved], [moved], lambda given: given + moved)
    assert graphs.recorded == 0 and graphs.recorder.alive == 0 and graphs.recorder.forgotten == 2
    graphs.begin_turn()
    graphs.call("key", [moved], [moved], lambda given: given + moved)
    assert graphs.recorded == 1
    graphs.drop()
    assert graphs.recorded == 0 and graphs.recorder.alive == 0


def test_nothing_is_recorded_between_stop_and_resume(graphs):
    def call_in_turns():
        for _ in range(3):
            graphs.begin_turn()
            graphs.call("key", [], [torch.ones(1)], lambda given: given + 1)
        return graphs.recorded

    assert call_in_turns() == 1
    graphs.stop("first")
    graphs.stop("second")
    assert call_in_turns() == 0 and graphs.off == "first" and graphs.recorder.alive == 0
    graphs.resume()
    assert call_in_turns() == 1 and not graphs.off


def test_few_kinds_are_kept(graphs):
    given = torch.ones(1)
    for kind in range(20):
        for _ in range(2):
            graphs.begin_turn()
            graphs.call(kind, [], [given], lambda value: value + 1)
    assert graphs.recorded == 6


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("no room"), RuntimeError("cannot wait while capturing")])
def test_what_cannot_be_recorded_is_said_once_and_computed(error, caplog):
    class Failing(StandIn):
        def __call__(self, function):
            raise error

    graphs = CallGraphs(recorder=Failing())
    made = []
    with caplog.at_level(logging.WARNING):
        for _ in range(4):
            graphs.begin_turn()
            made.append(graphs.call("key", [], [torch.ones(1)], lambda given: given + 1))
    assert torch.cat(made).tolist() == [2.0] * 4
    assert len(caplog.records) == 1 and str(error) in caplog.text and str(error) in graphs.off
    # Another stream may have the memory; what cannot be recorded at all is not tried again.
    graphs.resume()
    assert bool(graphs.off) == (type(error) is RuntimeError)


@pytest.fixture(scope="module")
def components():
    return make_components()


@pytest.mark.parametrize(
    ("settings", "backend"),
    [
        ({}, FLASH3_FP8),
        ({"fuse_context": True}, "native"),
        ({"kv_policy": "rolling"}, FLASH3_FP8),
        ({"kv_policy": "rolling", "fuse_context": True, "context_frames": 3}, "native"),
    ],
)
def test_a_stream_by_graphs_has_the_same_latents(components, graphs, settings, backend, monkeypatch):
    """Through a new prompt; the hooks of the transformer fire for each pass."""
    monkeypatch.setattr(stream_decoder, "decode_latent_frame", enlarge)
    made = {}
    with emulated_flash3():
        for name in ("launched", "by graphs"):
            pipe = make_pipeline(components)
            causal = causal_attention_of(pipe.transformer)
            causal.use_backend(backend)
            causal.graphs = graphs if name == "by graphs" else None
            passes: list[int] = []
            pipe.transformer.register_forward_pre_hook(lambda *_, passes=passes: passes.append(1))
            latents = stream(pipe, blocks=5, **settings)[0]
            made[name] = latents, len(passes)
    assert made["launched"][1] == made["by graphs"][1]
    for one, other in zip(made["launched"][0], made["by graphs"][0], strict=True):
        assert torch.equal(one, other)
    assert graphs.recorded and graphs.recorder.replays >= graphs.recorded
    assert "forward" not in vars(pipe.transformer)


def test_passes_that_do_not_come_again_are_launched(components, graphs):
    pipe = make_pipeline(components)
    causal_attention_of(pipe.transformer).graphs = graphs
    state = make_state(kv_policy="rolling", kv_format=KV_INT8)
    for index in range(3):
        state.values["block_idx"] = index
        run_steps(pipe, state, last="remember_block")
    assert graphs.recorded == 0 and "packed" in graphs.off
    graphs.resume()
    state = make_state(kv_policy="rolling", context_frames=3)
    for index in range(4):
        # Only the clean pass has no bias.
        state.values |= {"block_idx": index, "attention_bias": 0.5}
        run_steps(pipe, state, last="remember_block")
    assert graphs.recorded == 1 and graphs.recorder.replays == 2
    # A layer that begins to be streamed has hooks; what was recorded is given back.
    hook = pipe.transformer.blocks[1].register_forward_pre_hook(lambda *_: None)
    stream(pipe, blocks=2, last="remember_block", kv_policy="rolling")
    assert graphs.recorded == 0 and "hooks" in graphs.off
    hook.remove()


def test_the_oldest_picture_of_a_context_is_encoded_by_a_graph(components, graphs):
    vae = components[1]
    unused: Any = None
    plain, repeating = (CausalAttention(unused, "native", plain_norms=False) for _ in range(2))
    repeating.graphs = graphs
    past = Past(
        position=9,
        block_frames=3,
        context_frames=3,
        kv_cache=unused,
        cross_cache=unused,
        latents=torch.randn(1, 16, 3, 4, 6),
        pictures=[torch.empty(1, 3, 32, 48)] * 9,
        statistics=LatentStatistics.of(vae),
    )
    for number in range(4):
        graphs.begin_turn()
        drawn = replace(past, pictures=[torch.randn(1, 3, 32, 48) for _ in range(9)])
        made, expected = (Recompute()._context_latents(vae, drawn, 3, used) for used in (repeating, plain))
        assert torch.equal(made, expected) and graphs.recorded == (number >= 1)
