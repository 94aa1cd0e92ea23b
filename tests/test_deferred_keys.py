"""Under `rolling`, a block's clean keys are made in the next block's first pass: the same stream, in fewer passes."""

import copy
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch

from streamblocks.families.kv_policies import KV_FP8
from streamblocks.memory.tensor_bytes import held_tensor_bytes
from streamblocks.stream.state import StreamState
from streamblocks.wan.transformer.attention_passes import CausalPass
from streamblocks.wan.transformer.causal_transformer import (
    allocate_cross_cache,
    allocate_kv_cache,
    fill_cross_cache,
    predict_velocity,
    predict_with_context,
    write_keys,
)
from streamblocks.wan.transformer.eight_bits import PACKED_DTYPES, PackedTokens, Packing, as_packed
from streamblocks.wan.transformer.kv_cache import DeferredBlock, KVCache

from golden_wan import build_golden_transformer, load_golden, relative_error
from small_wan import BLOCKS, CHANGED_AT, LAYERS, make_components, make_pipeline, make_state, run_steps, stream

STEPS = 3
# The pictures do not matter to `rolling`.
LAST = "remember_block"


@pytest.fixture(scope="module")
def golden():
    return load_golden()


@pytest.fixture(scope="module")
def pipe():
    return make_pipeline(make_components())


def defer(cache, latents, frame_offset, text):
    cache.deferred = DeferredBlock(latents, frame_offset, "golden", text)


@pytest.mark.parametrize("sink", [0, 1])
def test_the_makers_values(golden, sink):
    """Their rolling window, whose clean pass is a pass of its own; the window slides from the third block on."""
    transformer = build_golden_transformer(golden)
    cross = allocate_cross_cache(transformer, text_tokens=16)
    fill_cross_cache(transformer, cross, golden["text"], "golden")
    cache = allocate_kv_cache(transformer, frames=6, latent_height=4, latent_width=6, sink_frames=sink)
    for block in range(4):
        key = f"rolling_sink{sink}/block{block}"
        causal_pass = CausalPass(cache, cross, frame_offset=3 * block)
        noise = golden[f"{key}/step0/in"]
        if cache.deferred is None:
            first = predict_velocity(transformer, noise, 1000.0, causal_pass)
        else:
            first = predict_with_context(transformer, cache.deferred.latents, noise, 1000.0, causal_pass)
            cache.commit(18)
            cache.begin_block(18)
        second = predict_velocity(transformer, golden[f"{key}/step1/in"], 625.0, causal_pass)
        assert relative_error(first, golden[f"{key}/step0/velocity"]) <= 1e-5
        assert relative_error(second, golden[f"{key}/step1/velocity"]) <= 1e-5
        defer(cache, golden[f"{key}/step2/in"], 3 * block, golden["text"])


CASES: dict[str, dict[str, Any]] = {
    "window of a block": {},
    "one frame a block": {"num_frames_per_block": 1, "attention_bias": 0.3},
    "sink and bias": {"sink_frames": 1, "context_frames": 4, "attention_bias": 0.3},
    "window shorter than a block": {"context_frames": 2, "sink_frames": 2},
    "in 8 bits": {"kv_format": KV_FP8, "sink_frames": 1, "context_frames": 5, "attention_bias": 0.3},
}


@pytest.mark.parametrize("settings", CASES.values(), ids=CASES)
def test_a_stream_is_the_same_without_passes_for_keys(pipe, settings):
    """But for the pass before another prompt: it needs the old one."""
    calls = [0] * LAYERS

    def count(module, arguments, index):
        calls[index] += 1

    def run(**more):
        seen = []
        made, _ = stream(pipe, lambda index: seen.append(calls[0]), last=LAST, kv_policy="rolling", **settings, **more)
        assert set(calls) == {calls[0]}
        return made, [later - earlier for earlier, later in pairwise([*seen, calls[0]])]

    hooks = [
        block.register_forward_pre_hook(lambda module, arguments, index=index: count(module, arguments, index))
        for index, block in enumerate(pipe.transformer.blocks)
    ]
    (apart, more), (together, fewer) = run(), run(fuse_context=True)
    for hook in hooks:
        hook.remove()
    # The keys of a prompt are one call, too.
    assert more == [STEPS + 1 + (index in (0, CHANGED_AT)) for index in range(BLOCKS)]
    assert fewer == [STEPS + (index == 0) + 2 * (index == CHANGED_AT) for index in range(BLOCKS)]
    for ours, theirs in zip(together, apart, strict=True):
        assert relative_error(ours, theirs) <= 1e-5


def test_a_block_of_another_length_has_the_keys_before_it_written_first(pipe):
    made: list[list[torch.Tensor]] = []
    lengths = (3, 1, 1, 2, 3)
    for fuse_context in (False, True):
        state = make_state(kv_policy="rolling", fuse_context=fuse_context)
        made.append([])
        passes = 0

        def count(module, arguments):
            nonlocal passes
            passes += 1

        hook = pipe.transformer.register_forward_pre_hook(count)
        for index, frames in enumerate(lengths):
            state.values |= {"block_idx": index, "num_frames_per_block": frames}
            run_steps(pipe, state, last=LAST)
            made[-1].append(state.get("current_denoised_latents"))
        hook.remove()
        # After the blocks 0, 2 and 3 the next is of another length; the last one's keys are not needed.
        assert passes == len(lengths) * STEPS + (3 if fuse_context else len(lengths))
    for ours, theirs in zip(made[1], made[0], strict=True):
        assert relative_error(ours, theirs) <= 1e-5


def test_a_stream_that_no_longer_fuses_writes_what_was_deferred(pipe):
    def run(fused_blocks):
        state = make_state(kv_policy="rolling")
        for index in range(4):
            state.values |= {"block_idx": index, "fuse_context": index < fused_blocks}
            run_steps(pipe, state, last=LAST)
        assert (state.get("kv_cache").deferred is not None) == (fused_blocks == 4)
        return state.get("current_denoised_latents")

    assert relative_error(run(2), run(0)) <= 1e-5


def test_the_state_does_not_grow(pipe):
    state = make_state(kv_policy="rolling", fuse_context=True, sink_frames=1, context_frames=4)
    held = []
    for index in range(6):
        state.set("block_idx", index)
        run_steps(pipe, state, last=LAST)
        del state.values["latents"]
        held.append(held_tensor_bytes(state.values))
    assert len(set(held[3:])) == 1


def first_steps(golden, *, fused, packed):
    """The velocity after a deferred block, and the next step's; a window of 6 frames, full before the block."""
    transformer = build_golden_transformer(golden)
    cross = allocate_cross_cache(transformer, text_tokens=16)
    fill_cross_cache(transformer, cross, golden["text"], "golden")
    cache = allocate_kv_cache(
        transformer,
        frames=6,
        latent_height=4,
        latent_width=6,
        sink_frames=1,
        packing=Packing(6, packed) if packed else None,
    )
    first, second, noise = torch.randn((3, 1, 16, 3, 4, 6), generator=torch.Generator().manual_seed(0))
    write_keys(transformer, first, 0.0, CausalPass(cache, cross, frame_offset=0))
    cache.commit(18)
    causal_pass = CausalPass(cache, cross, frame_offset=6)
    if fused:
        defer(cache, second, 3, golden["text"])
        velocity = predict_with_context(transformer, second, noise, 1000.0, causal_pass)
    else:
        write_keys(transformer, second, 0.0, CausalPass(cache, cross, frame_offset=3))
    cache.commit(18)
    cache.begin_block(18)
    if not fused:
        velocity = predict_velocity(transformer, noise, 1000.0, causal_pass)
    return velocity, predict_velocity(transformer, 0.5 * noise, 500.0, causal_pass)


@pytest.mark.parametrize("packed", PACKED_DTYPES)
def test_the_first_step_sees_the_new_keys_in_8_bits(golden, packed):
    apart, together = (first_steps(golden, fused=fused, packed=packed) for fused in (False, True))
    exact = first_steps(golden, fused=True, packed=None)
    for ours, theirs, unrounded in zip(together, apart, exact, strict=True):
        assert relative_error(ours, theirs) <= 1e-6
        assert relative_error(ours, unrounded) >= 1e-4


@pytest.mark.parametrize("packed_dtype", PACKED_DTYPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rounding_in_the_models_dtype_is_that_of_packing(dtype, packed_dtype):
    """Also of values that are nothing in e4m3fn, of those below its smallest normal number, and of ties."""
    torch.manual_seed(0)
    values = torch.randn(1, 64, 3, 16) * torch.logspace(-4, 4, 64).view(1, 64, 1, 1)
    values[..., :8] *= torch.logspace(-6, 0, 8)
    # With a largest of 448 the scale is 1.
    values[:, 0] = torch.arange(48.0).view(3, 16) / 8
    values[:, 0, :, 0] = 448
    values[:, 1] = 0
    values = values.to(dtype)
    packed = PackedTokens.allocate(64, 3, 16, torch.device("cpu"), packed_dtype)
    packed.pack_from(values, 0, 64)
    expected = torch.zeros_like(values)
    packed.unpack_to(expected, 64)
    assert torch.equal(as_packed(values, packed_dtype), expected)
    assert not torch.equal(expected, values)


def test_what_was_deferred_and_is_written_stays_written():
    """Its pass saw tokens that may be gone by then."""
    cache = KVCache.allocate(
        layers=1, heads=1, head_dim=6, frames=6, tokens_per_frame=2, device=torch.device("cpu"), dtype=torch.float32
    )
    cache.commit(6)
    cache.deferred = before = DeferredBlock(torch.zeros(1, 1, 3, 1, 2), 3, "waves", torch.zeros(1))
    rewind = cache.remember()
    assert rewind() and (cache.length, cache.deferred) == (6, before)
    cache.commit(6)
    cache.begin_block(6)
    cache.deferred = replace(before, frame_offset=6)
    assert rewind() and (cache.length, cache.evicted, cache.deferred) == (6, 6, None)
    rewind = cache.remember()
    cache.deferred = before
    assert rewind() and (cache.length, cache.deferred) == (6, None)


@pytest.mark.parametrize("step", [0, 1], ids=["in the pass of two blocks", "after it"])
def test_a_block_that_runs_out_of_memory_is_made_again(pipe, step):
    """In the middle of a pass, when some layers have written the deferred block's keys and others have not."""
    settings: dict[str, Any] = {"kv_policy": "rolling", "context_frames": 4, "sink_frames": 1}
    apart, _ = stream(pipe, blocks=5, last=LAST, **settings)
    state = StreamState(dict(make_state(fuse_context=True, **settings).values))
    calls = {"left": -1}

    def run_out(module, arguments):
        calls["left"] -= 1
        if calls["left"] == -1:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    hook = pipe.transformer.blocks[2].register_forward_pre_hook(run_out)
    for index in range(3):
        if index == 2:
            # For this block the window slides.
            calls["left"] = step
            rewind, noise = state.remember(), state.get("generator").get_state()
            with pytest.raises(torch.OutOfMemoryError):
                run_steps(pipe, copy.deepcopy(state), last=LAST)
            assert rewind() and (state.get("kv_cache").deferred is None) == (step > 0)
            state.get("generator").set_state(noise)
        state.set("block_idx", index)
        run_steps(pipe, state, last=LAST)
        assert relative_error(state.get("current_denoised_latents"), apart[index]) <= 1e-5
    hook.remove()
