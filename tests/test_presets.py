"""Presets: which model is which, what its makers use, and what a user left to them."""

import json
from pathlib import Path

import pytest
from diffusers import FlowMatchEulerDiscreteScheduler

from streamblocks.checkpoints.checkpoint_files import CheckpointError
from streamblocks.checkpoints.quantization_plan import ComponentWeights
from streamblocks.families.kv_policies import KEEP_KEYS, RECOMPUTE_KEYS
from streamblocks.families.step_list import StepList
from streamblocks.stream.choices import StreamChoices
from streamblocks.stream.known_families import FAMILIES, find_preset, preset_names
from streamblocks.stream.materialise import materialise
from streamblocks.stream.recipe import Recipe
from streamblocks.stream.session import Session
from streamblocks.stream.settings import StreamSettings
from streamblocks.wan.checkpoints.preset_choice import choose_preset
from streamblocks.wan.presets import (
    CAUSAL_FORCING,
    CAUSAL_FORCING_1_STEP,
    CAUSAL_FORCING_2_STEPS,
    CAUSAL_FORCING_FRAMEWISE,
    KREA_REALTIME,
    LONGLIVE,
    MEMFLOW,
    REWARD_FORCING,
    SELF_FORCING,
    STREAM_DIFFUSION,
    STREAM_DIFFUSION_VIDEO,
    UNNAMED,
    WAN_21_PRESETS,
)
from streamblocks.wan.steps.few_step_schedule import make_few_step_schedule, make_listed_schedule
from streamblocks.wan.tiny_model import write_tiny_model

MINI = Path(__file__).resolve().parent.parent / "models/mini"


def weights(path="models/diffusers/some", heads=40, **config):
    return ComponentWeights(Path(path), {"num_attention_heads": heads, "attention_head_dim": 128, **config}, {})


def chosen(*args, **kwargs):
    return choose_preset(WAN_21_PRESETS, UNNAMED, weights(*args, **kwargs))


@pytest.mark.parametrize(
    ("path", "heads", "preset"),
    [
        ("krea-realtime-video-14b.safetensors", 40, KREA_REALTIME),
        ("hub/models--krea--krea-realtime-video/snapshots/0a1b", 40, KREA_REALTIME),
        ("Self-Forcing/checkpoints/self_forcing_dmd.pt", 12, SELF_FORCING),
        ("Causal-Forcing/chunkwise/causal_forcing.pt", 12, CAUSAL_FORCING),
        ("Causal-Forcing/framewise/causal_forcing.pt", 12, CAUSAL_FORCING_FRAMEWISE),
        ("Causal-Forcing/causal-forcing++/framewise-2step.pt", 12, CAUSAL_FORCING_2_STEPS),
        ("Causal-Forcing/causal-forcing++/framewise-1step.pt", 12, CAUSAL_FORCING_1_STEP),
        ("LongLive-1.3B/models/longlive_base.pt", 12, LONGLIVE),
        ("MemFlow/base.pt", 12, MEMFLOW),
        ("Reward-Forcing/rewardforcing.pt", 12, REWARD_FORCING),
        ("StreamDiffusionV2/wan_causal_dmd_v2v/model.pt", 12, STREAM_DIFFUSION),
        # Nothing in the name says which: by size.
        ("wan/model.pt", 12, SELF_FORCING),
        ("wan/model.pt", 40, KREA_REALTIME),
        ("wan/model.pt", 2, KREA_REALTIME),
    ],
)
def test_a_checkpoint_is_known_by_its_published_name_or_its_size(path, heads, preset):
    assert chosen("models/diffusion_models/" + path, heads) == preset


def test_the_makers_lists_are_what_evenly_spaced_steps_make():
    """So that a preset of 4 steps needs no list."""
    listed = make_listed_schedule(StepList((1000, 750, 500, 250)))
    even = make_few_step_schedule(4)
    assert listed.timesteps == pytest.approx(even.timesteps, rel=1e-12)
    assert listed.sigmas == pytest.approx(even.sigmas, rel=1e-12)


@pytest.mark.parametrize(("shift", "timesteps"), [(8.0, (700, 500)), (8.0, (1000, 750, 500, 250)), (5.0, (937, 12))])
def test_raw_timesteps_take_the_sigma_of_the_nearest_of_a_schedule_by_diffusers(shift, timesteps):
    # 1,000 shifted sigmas without the last zero: the table that the makers' code searches.
    table = FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=shift).sigmas.double()[:1000]
    schedule = make_listed_schedule(StepList(timesteps, raw=True), shift=shift)
    assert schedule.timesteps == timesteps
    for timestep, sigma in zip(timesteps, schedule.sigmas, strict=True):
        nearest = table[(table * 1000 - timestep).abs().argmin()]
        assert sigma == pytest.approx(float(nearest), rel=1e-6)


@pytest.mark.parametrize(
    ("text", "listed"),
    [
        ("1000, 750,500 250", StepList((1000, 750, 500, 250))),
        (" RAW: 700,500 ", StepList((700, 500), raw=True)),
        ("937.5", StepList((937.5,))),
        ("", None),
    ],
)
def test_lists_as_users_write_them(text, listed):
    assert StepList.parse("timesteps", text) == listed
    assert listed is None or StepList.parse("timesteps", str(listed)) == listed


@pytest.mark.parametrize(
    "text", ["1000, 1000", "500, 750", "1001", "0", "nan", "inf", "raw:", "four", "1000; 500", "-1"]
)
def test_what_is_no_list_of_timesteps_is_named(text):
    with pytest.raises(ValueError, match=r"^timesteps is .*: give falling timesteps above 0 and up to 1000, such as "):
        StepList.parse("timesteps", text)


@pytest.mark.parametrize(
    ("config", "frames", "context", "sink"),
    [
        ({"num_frames_per_block": 3}, 3, 18, 0),
        ({"num_frame_per_block": 1}, 1, 20, 0),
        ({"num_frame_per_block": 3, "local_attn_size": 12, "sink_size": 3}, 3, 9, 3),
        ({"local_attn_size": -1, "sink_size": 0}, 3, 18, 0),
    ],
)
def test_a_config_says_block_window_and_sink(config, frames, context, sink):
    preset = chosen("wan/model", 12, **config)
    assert (preset.frames_per_block, preset.context_frames, preset.sink_frames) == (frames, context, sink)


@pytest.mark.parametrize(
    "config", [{"num_frames_per_block": 0}, {"num_frame_per_block": "3"}, {"sink_size": -3}, {"local_attn_size": "12"}]
)
def test_a_config_that_cannot_be_is_named(config):
    (name,) = config
    with pytest.raises(CheckpointError, match=rf"has .*{name} .* in its config, allowed are whole numbers"):
        chosen("wan/model", 12, **config)


def test_the_mini_models_own_settings_are_its_videos():
    preset = materialise(Recipe(str(MINI))).own_preset()
    assert (preset.name, preset.width, preset.height, preset.fps) == ("StreamBlocks mini", 64, 64, 8)
    assert preset.steps == 4 and preset.kv_policy == "recompute"


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ('{"width": "64"}', "has width = '64'"),
        ('{"files": []}', r"has files = \[\]: it may have name, width"),
        ('{"steps": true}', "has steps = True"),
        ("[]", "holds no JSON object"),
        ("{", "cannot be read as JSON"),
    ],
)
def test_a_models_own_settings_that_cannot_be_are_named(tmp_path, content, says):
    (tmp_path / "streaming.json").write_text(content)
    with pytest.raises(CheckpointError, match=says):
        chosen(str(tmp_path))


def test_what_is_left_open_comes_from_the_preset():
    settings = StreamChoices(height=256, blocks=2, seed=7).complete(CAUSAL_FORCING_2_STEPS)
    assert settings == StreamSettings(
        width=832,
        height=256,
        blocks=2,
        seed=7,
        steps=2,
        kv_policy="rolling",
        context_frames=20,
        frames_per_block=1,
        timesteps=StepList((1000, 500)),
        first_block_timesteps=StepList((1000, 750, 500, 250)),
    )
    assert settings.passes == 4 + 2 and settings.passes_before(1) == 4
    assert json.loads(json.dumps(settings.as_dict()))["first_block_timesteps"] == "1000, 750, 500, 250"


def test_what_is_chosen_replaces_what_depends_on_it():
    assert StreamChoices(steps=6).complete(STREAM_DIFFUSION_VIDEO).timesteps is None
    assert StreamChoices(timesteps=StepList((900, 100))).complete(KREA_REALTIME).steps == 2
    assert StreamChoices(context_frames=2).complete(LONGLIVE).sink_frames == 2
    assert StreamChoices(sink_frames=0).complete(LONGLIVE).sink_frames == 0
    assert StreamChoices().complete(LONGLIVE).on_prompt_change == RECOMPUTE_KEYS
    assert StreamChoices().complete(SELF_FORCING).on_prompt_change == KEEP_KEYS
    assert StreamChoices(on_prompt_change=KEEP_KEYS).complete(LONGLIVE).on_prompt_change == KEEP_KEYS
    with pytest.raises(ValueError, match="on_prompt_change is 'both': choose one of keep keys, recompute keys"):
        StreamChoices(on_prompt_change="both").check(16)
    with pytest.raises(ValueError, match=r"steps is 3 and timesteps are 900, 100: give as many steps as the list has"):
        StreamChoices(steps=3, timesteps=StepList((900, 100))).complete(KREA_REALTIME)


def test_every_preset_makes_settings_and_can_be_found():
    assert len(set(preset_names())) == len(preset_names())
    for family in FAMILIES:
        for preset in family.presets:
            settings = StreamChoices().complete(preset)
            family.geometry.check_size(settings.width, settings.height)
            assert find_preset(preset.name) is preset and preset.source
    with pytest.raises(ValueError, match="preset is 'other': choose one of Krea Realtime 14B, "):
        find_preset("other")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.mark.parametrize("preset", WAN_21_PRESETS, ids=lambda preset: preset.name)
def test_each_preset_streams(tiny, preset):
    """The passes of the transformer, block by block, and the pictures of each."""
    small = StreamChoices(width=32, height=32, blocks=3).complete(preset)
    seen: list[int] = []
    with Session(materialise(Recipe(str(tiny))), small, on_pass=seen.append) as session:
        for block in range(3):
            seen.clear()
            frames = session.run_block("waves").frames
            extra = 1 if preset.kv_policy == "rolling" or block else 0
            assert len(seen) == small.passes_before(block + 1) - small.passes_before(block) + extra
            assert len(frames) == 4 * small.frames_per_block - (3 if block == 0 else 0)


def test_only_a_block_without_a_past_takes_the_first_list(tiny):
    """A stream that goes on from another one's state is not a first block, whatever its number."""
    first, then = StepList((1000, 900, 800)), StepList((1000,))
    choices = StreamChoices(width=32, height=32, first_block_timesteps=first, timesteps=then)
    settings = choices.complete(KREA_REALTIME)
    pipeline = materialise(Recipe(str(tiny)))
    with Session(pipeline, settings) as session:
        session.run_block("waves")
        values = session._state.values
        start = {"stream_position": 3, "current_denoised_latents": values["current_denoised_latents"].clone()}
    seen: list[int] = []
    with Session(pipeline, settings, on_pass=seen.append, start_from=start) as session:
        session.run_block("waves")
    # The context and one step.
    assert len(seen) == 2
