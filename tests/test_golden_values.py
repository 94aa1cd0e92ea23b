"""Our causal transformer against the values of the makers' own implementation."""

import json

import pytest
import torch

from streamblocks.wan.steps.few_step_schedule import make_few_step_schedule
from streamblocks.wan.transformer.attention_passes import CausalPass
from streamblocks.wan.transformer.causal_transformer import (
    allocate_cross_cache,
    allocate_kv_cache,
    fill_cross_cache,
    predict_velocity,
)
from streamblocks.wan.transformer.kv_cache import KVCache

from golden_wan import DATA, build_golden_transformer, load_golden, relative_error

TOLERANCE = 1e-5
STEP_TIMESTEPS = (1000.0, 937.0, 833.0, 625.0)
SCHEDULES = json.loads((DATA / "schedule.json").read_text())
COVERED = {
    *(f"recompute/block0/step{step}/velocity" for step in range(4)),
    *(f"recompute/block{block}/context_velocity" for block in (1, 2)),
    *(f"recompute/block{block}/step{step}/velocity" for block in (1, 2) for step in range(2)),
    "recompute/two_context_blocks/context_velocity",
    "recompute/two_context_blocks/velocity",
    *(
        f"rolling_sink{sink}/block{block}/step{step}/velocity"
        for sink in (0, 1)
        for block in range(4)
        for step in range(3)
    ),
}


@pytest.fixture(scope="module")
def golden():
    return load_golden()


@pytest.fixture(scope="module")
def transformer(golden):
    return build_golden_transformer(golden)


@pytest.fixture(scope="module")
def cross_cache(golden, transformer):
    cache = allocate_cross_cache(transformer, text_tokens=16)
    fill_cross_cache(transformer, cache, golden["text"], "golden")
    return cache


def make_cache(transformer, frames: int, sink_frames: int = 0) -> KVCache:
    return allocate_kv_cache(transformer, frames=frames, latent_height=4, latent_width=6, sink_frames=sink_frames)


def check(golden, name: str, actual: torch.Tensor) -> None:
    assert relative_error(actual, golden[name]) <= TOLERANCE, name


def test_recompute_first_block(golden, transformer, cross_cache):
    cache = make_cache(transformer, frames=6)
    for step, timestep in enumerate(STEP_TIMESTEPS):
        cache.reset()
        key = f"recompute/block0/step{step}"
        velocity = predict_velocity(
            transformer, golden[f"{key}/in"], timestep, CausalPass(cache, cross_cache, frame_offset=0)
        )
        check(golden, f"{key}/velocity", velocity)


@pytest.mark.parametrize("block", [1, 2])
def test_recompute_block_with_context(golden, transformer, cross_cache, block):
    cache = make_cache(transformer, frames=6)
    prefix = f"recompute/block{block}"
    context = CausalPass(cache, cross_cache, frame_offset=0, causal_tokens=18)
    velocity = predict_velocity(transformer, golden[f"{prefix}/context"], 0.0, context)
    check(golden, f"{prefix}/context_velocity", velocity)
    cache.commit(18)
    check(golden, f"{prefix}/layer0_k_after_context", cache.keys[0][:, :18])
    for step, timestep in enumerate((1000.0, 625.0)):
        key = f"{prefix}/step{step}"
        velocity = predict_velocity(
            transformer, golden[f"{key}/in"], timestep, CausalPass(cache, cross_cache, frame_offset=3)
        )
        check(golden, f"{key}/velocity", velocity)


def test_recompute_two_context_blocks(golden, transformer, cross_cache):
    cache = make_cache(transformer, frames=9)
    prefix = "recompute/two_context_blocks"
    context = CausalPass(cache, cross_cache, frame_offset=0, causal_tokens=18)
    velocity = predict_velocity(transformer, golden[f"{prefix}/context"], 0.0, context)
    check(golden, f"{prefix}/context_velocity", velocity)
    cache.commit(36)
    velocity = predict_velocity(
        transformer, golden[f"{prefix}/in"], 937.0, CausalPass(cache, cross_cache, frame_offset=6)
    )
    check(golden, f"{prefix}/velocity", velocity)


@pytest.mark.parametrize("sink", [0, 1])
def test_rolling_window(golden, transformer, cross_cache, sink):
    cache = make_cache(transformer, frames=6, sink_frames=sink)
    for block in range(4):
        cache.begin_block(18)
        for step, timestep in enumerate((1000.0, 625.0, 0.0)):
            key = f"rolling_sink{sink}/block{block}/step{step}"
            velocity = predict_velocity(
                transformer,
                golden[f"{key}/in"],
                timestep,
                CausalPass(cache, cross_cache, frame_offset=3 * block),
            )
            check(golden, f"{key}/velocity", velocity)
        cache.commit(18)


def test_no_reference_velocity_is_left_out(golden):
    assert {name for name in golden if name.endswith("velocity")} == COVERED


@pytest.mark.parametrize("case", SCHEDULES["cases"], ids=lambda c: f"{c['strength']}-{c['steps']}")
def test_schedule_equals_the_makers(case):
    """Their list counts a last pass at t = 0 among its steps; ours ends before it."""
    schedule = make_few_step_schedule(case["steps"] - 1, strength=case["strength"], shift=SCHEDULES["shift"])
    assert case["timesteps"][-1] == 0.0
    assert schedule.timesteps == pytest.approx(case["timesteps"][:-1], rel=1e-6)
    assert schedule.sigmas == pytest.approx(case["sigmas"][:-1], abs=1e-6)


def test_distilled_step_list_has_no_pass_at_zero():
    schedule = make_few_step_schedule(4)
    assert schedule.timesteps == pytest.approx((1000.0, 937.5, 833.3333, 625.0), abs=1e-4)
