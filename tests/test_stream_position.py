"""A stream's place in time is in its state: cut streams continue as if uncut, and one can start with given latents."""

import copy
from functools import cache
from typing import Any

import pytest
import torch
from diffusers.modular_pipelines import PipelineState

from streamblocks.memory.cleanup import STATE_RULES
from streamblocks.stream.materialise import materialise
from streamblocks.stream.recipe import Recipe
from streamblocks.stream.session import Session
from streamblocks.stream.settings import StreamSettings
from streamblocks.wan.steps.causal_wan_blocks import make_causal_wan_pipeline
from streamblocks.wan.transformer.attention_passes import CausalPass
from streamblocks.wan.transformer.causal_transformer import predict_velocity

from golden_wan import build_golden_transformer, load_golden, relative_error
from small_wan import make_components, make_pipeline, make_state, run_steps

PROMPTS = ["a cat", "a cat", "a dog on a red sofa", "a dog on a red sofa", "a cat"]
CONTEXT = ("stream_position", "current_denoised_latents", "frame_cache_context", "decoder_cache")
KEPT = {"recompute": CONTEXT, "rolling": ("stream_position", "decoder_cache", "kv_cache")}
POLICIES: dict[str, dict[str, Any]] = {
    # The window slides from block 2 on, or from block 3 on.
    "recompute": {"kv_policy": "recompute"},
    "recompute, six context frames": {"kv_policy": "recompute", "context_frames": 6},
    # The keys of the first block leave the cache at block 2; with a sink, the first frame's stay.
    "rolling": {"kv_policy": "rolling"},
    "rolling with sink": {"kv_policy": "rolling", "sink_frames": 1, "context_frames": 4},
    # The cache takes the latents along whose keys it lacks, and their prompt.
    "rolling, keys deferred": {"kv_policy": "rolling", "fuse_context": True},
}


def small(**changes):
    return StreamSettings(**({"width": 32, "height": 48, "steps": 2, "seed": 7} | changes))


@pytest.fixture(scope="module")
def pipeline(tiny_folder):
    return materialise(Recipe(model=str(tiny_folder)))


@pytest.fixture(scope="module")
def small_pipeline():
    return make_pipeline(make_components())


@pytest.fixture(scope="module")
def uncut(pipeline):
    @cache
    def frames(policy):
        with Session(pipeline, small(**POLICIES[policy])) as session:
            return [session.run_block(prompt).frames for prompt in PROMPTS]

    return frames


def hand_over(values, names):
    """Copies, as a snapshot would hold them: the stream that goes on writes into its own."""
    generator = torch.Generator()
    generator.set_state(values["generator"].get_state())
    return {name: copy.deepcopy(values[name]) for name in names} | {"generator": generator}


@pytest.mark.parametrize("cut", [1, 2, 3, 4])
@pytest.mark.parametrize("policy", POLICIES)
def test_a_cut_stream_goes_on_as_if_it_were_uncut(pipeline, uncut, policy, cut):
    settings = small(**POLICIES[policy])
    with Session(pipeline, settings) as session:
        for prompt in PROMPTS[:cut]:
            session.run_block(prompt)
        start = hand_over(session._state.values, KEPT[settings.kv_policy])
    assert start["stream_position"] == 3 * cut
    with Session(pipeline, settings, start_from=start) as session:
        for prompt, expected in zip(PROMPTS[cut:], uncut(policy)[cut:], strict=True):
            assert torch.equal(session.run_block(prompt).frames, expected)


@pytest.mark.parametrize("policy", POLICIES)
def test_the_usual_loop_needs_no_block_idx(pipeline, uncut, policy):
    """diffusers' own state, copied on every call."""
    known = set(pipeline.pipe.blocks.input_names)
    inputs = {name: value for name, value in small(**POLICIES[policy]).pipeline_inputs().items() if name in known}
    state, generator = PipelineState(), torch.Generator().manual_seed(7)
    for index, prompt in enumerate(PROMPTS[:3]):
        state = pipeline.pipe(state, prompt=prompt, generator=generator, **inputs)
        assert torch.equal(state.get("videos")[0], uncut(policy)[index])


@pytest.mark.parametrize(
    ("name", "context_frames", "timestep", "noised"),
    [
        ("recompute/block1", 3, 1000.0, "recompute/block1/step0/in"),
        ("recompute/block2", 3, 625.0, "recompute/block2/step1/in"),
        ("recompute/two_context_blocks", 6, 937.0, "recompute/two_context_blocks/in"),
    ],
)
def test_a_first_block_attends_to_given_latents(name, context_frames, timestep, noised):
    """The makers' values of a block after its context; here no block was made before it."""
    golden = load_golden()
    pipe = make_causal_wan_pipeline()
    pipe.update_components(transformer=build_golden_transformer(golden), vae=make_components()[1])
    state = make_state(
        prompt_embeds=golden["text"],
        encoded_prompt="golden",
        stream_position=context_frames,
        context_frames=context_frames,
        current_denoised_latents=golden[f"{name}/context"],
    )
    run_steps(pipe, state, last="refill_context")
    assert state.get("frame_offset") == context_frames
    causal_pass = CausalPass(state.get("kv_cache"), state.get("crossattn_cache"), state.get("frame_offset"))
    velocity = predict_velocity(pipe.transformer, golden[noised], timestep, causal_pass)
    assert relative_error(velocity, golden[noised.removesuffix("in") + "velocity"]) <= 1e-5


@pytest.mark.parametrize("given", [1, 3, 6])
def test_a_stream_started_with_latents_goes_on(small_pipeline, given):
    """Also after the window slides, while the held pictures do not yet reach back to the given latents."""
    latents = torch.randn((1, 16, given, 4, 6), generator=torch.Generator().manual_seed(4))
    made = []
    for start in (latents, -latents):
        state = make_state(stream_position=given, context_frames=6, current_denoised_latents=start)
        counts = []
        for _ in range(4):
            run_steps(small_pipeline, state)
            counts.append(state.get("videos").shape[1])
            made.append(state.get("current_denoised_latents"))
        assert counts == [9, 12, 12, 12]
        assert state.get("stream_position") == given + 12
    assert all(torch.isfinite(block).all() for block in made)
    assert not torch.equal(made[0][:, :, -3:], made[4][:, :, -3:])


@pytest.mark.parametrize("sink", [0, 1])
@pytest.mark.parametrize("frames", [1, 3])
def test_keys_of_a_window_are_computed_again_from_its_latents(small_pipeline, frames, sink):
    """Before the window slides they are those that the stream computed on its way."""
    entries = {"kv_policy": "rolling", "context_frames": 6, "num_frames_per_block": frames, "sink_frames": sink}
    state = make_state(**entries)
    for _ in range(6 // frames):
        run_steps(small_pipeline, state)
    cache, tokens = state.get("kv_cache"), 6 * state.get("kv_cache").tokens_per_frame
    assert cache.length == tokens
    latents, on_the_way = state.get("current_denoised_latents"), torch.stack(cache.keys)[:, :, :tokens]
    again = make_state(**entries, stream_position=6, current_denoised_latents=latents)
    run_steps(small_pipeline, again, last="refill_context")
    assert relative_error(torch.stack(again.get("kv_cache").keys)[:, :, :tokens], on_the_way) <= 1e-5
    state.set("keys_are_stale", True)
    for key in cache.keys:
        key.fill_(torch.nan)
    run_steps(small_pipeline, state, last="refill_context")
    assert relative_error(torch.stack(cache.keys)[:, :, :tokens], on_the_way) <= 1e-5
    assert state.get("keys_are_stale") is False


def test_keys_of_a_window_that_slid_are_at_their_places(small_pipeline):
    """The sink's own are those of the stream's first frame; the newest frames are at theirs in time."""
    entries = {"kv_policy": "rolling", "context_frames": 4, "sink_frames": 1}
    state = make_state(**entries)
    for _ in range(3):
        run_steps(small_pipeline, state)
    first = state.get("kv_cache").keys[0][:, : state.get("kv_cache").tokens_per_frame].clone()
    again = make_state(
        **entries,
        stream_position=9,
        sink_latents=state.get("sink_latents"),
        current_denoised_latents=state.get("current_denoised_latents"),
    )
    for each in (state, again):
        run_steps(small_pipeline, each, last="refill_context")
    kept, made = (each.get("kv_cache") for each in (state, again))
    assert made.length == kept.length == 4 * kept.tokens_per_frame
    assert relative_error(made.keys[0][:, : kept.tokens_per_frame], first) <= 1e-5
    # Keys of the first layer depend on nothing but the frame and its place.
    assert relative_error(made.keys[0][:, : made.length], kept.keys[0][:, : kept.length]) <= 1e-5


def test_a_new_stream_does_not_keep_latents_of_before_its_start(small_pipeline):
    past = torch.randn(1, 16, 3, 4, 6)
    fresh, used = make_state(context_frames=6), make_state(context_frames=6, current_denoised_latents=past)
    for state in (fresh, used):
        run_steps(small_pipeline, state)
    assert torch.equal(fresh.get("current_denoised_latents"), used.get("current_denoised_latents"))


@pytest.mark.parametrize(("policy", "offsets"), [("recompute", [0, 3, 3, 3]), ("rolling", [0, 3, 4, 6])])
def test_the_position_counts_latent_frames_not_blocks(small_pipeline, policy, offsets):
    state = make_state(kv_policy=policy)
    seen, positions, pictures = [], [], []
    for index, frames in enumerate((3, 1, 2, 3)):
        state.values |= {"block_idx": index, "num_frames_per_block": frames}
        run_steps(small_pipeline, state)
        seen.append(state.get("frame_offset"))
        positions.append(state.get("stream_position"))
        pictures.append(state.get("videos").shape[1])
        assert torch.isfinite(state.get("current_denoised_latents")).all()
    assert seen == offsets
    assert positions == [3, 4, 6, 9]
    assert pictures == [9, 4, 8, 12]


def test_a_longer_block_attends_to_what_the_cache_has_room_for(small_pipeline):
    state = make_state(num_frames_per_block=1)
    for _ in range(4):
        run_steps(small_pipeline, state)
    # Room for four latent frames: three of the block, one of the past. The same as from a window of one.
    kept = ("stream_position", "current_denoised_latents", "frame_cache_context", "decoder_cache")
    narrow = make_state(num_frames_per_block=3, context_frames=1, **hand_over(state.values, kept))
    state.set("num_frames_per_block", 3)
    for each in (state, narrow):
        run_steps(small_pipeline, each)
    assert state.get("frame_offset") == narrow.get("frame_offset") == 1
    assert torch.equal(state.get("current_denoised_latents"), narrow.get("current_denoised_latents"))
    state.set("num_frames_per_block", 4)
    with pytest.raises(ValueError, match=r"num_frames_per_block is 4: .* holds 4 latent frames .* choose at most 3"):
        run_steps(small_pipeline, state)


LATENTS = torch.zeros(1, 16, 3, 4, 6)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"stream_position": -1}, "stream_position is -1: give"),
        ({"stream_position": 3}, "current_denoised_latents holds 0 latent frames: .* needs the last 3"),
        ({"block_idx": 1}, "current_denoised_latents holds 0 latent frames"),
        ({"stream_position": 120_000, "current_denoised_latents": LATENTS[:, :, :2]}, "holds 2 latent frames"),
        ({"stream_position": 6, "current_denoised_latents": LATENTS}, "frame_cache_context holds no pictures: .* 9"),
        ({"stream_position": 3, "kv_policy": "rolling"}, r"kv_cache is empty: .* holds 0 \(sink_latents 0\)"),
        (
            {"stream_position": 9, "kv_policy": "rolling", "sink_frames": 1, "current_denoised_latents": LATENTS},
            r"keys of 3 frames before it, and current_denoised_latents holds 3 \(sink_latents 0\)",
        ),
        ({"kv_policy": "full"}, "kv_policy is 'full': choose one of recompute, rolling"),
    ],
)
def test_a_start_with_too_little_of_the_past_is_named(small_pipeline, entries, message):
    with pytest.raises(ValueError, match=message):
        run_steps(small_pipeline, make_state(**entries))


def test_every_entry_that_a_stream_goes_on_from_has_a_rule():
    assert {name for names in KEPT.values() for name in names} <= {rule.key for rule in STATE_RULES}


def test_pictures_handed_over_do_not_pile_up(small_pipeline):
    """In a list, or a deque of another length."""
    state = make_state()
    for _ in range(2):
        run_steps(small_pipeline, state)
    newest = list(state.get("frame_cache_context"))
    state.set("frame_cache_context", [torch.zeros_like(newest[0]), *newest])
    twin = make_state(**hand_over(state.values, CONTEXT) | {"frame_cache_context": newest})
    for each in (state, twin):
        run_steps(small_pipeline, each)
        assert len(each.get("frame_cache_context")) == 9
    assert torch.equal(state.get("current_denoised_latents"), twin.get("current_denoised_latents"))


@pytest.mark.parametrize("policy", ["recompute", "rolling"])
def test_counting_from_0_again_starts_a_new_stream_in_a_used_state(policy):
    """As hand-written loops over a modular pipeline do; also at another size."""
    pipe = make_pipeline(make_components())

    def blocks(state, **settings):
        state.values |= {"generator": torch.Generator().manual_seed(2), "kv_policy": policy, **settings}
        made = []
        for index in range(3):
            state.values["block_idx"] = index
            run_steps(pipe, state)
            made.append(state.values["videos"])
        return made

    used = make_state()
    blocks(used)
    for size in ({}, {"height": 48, "width": 32}):
        again, fresh = blocks(used, **size), blocks(make_state(), **size)
        assert [pictures.shape[1] for pictures in again] == [9, 12, 12]
        for ours, theirs in zip(again, fresh, strict=True):
            assert torch.equal(ours, theirs)
