"""A stream that cannot go on says which of recipe, settings and files differs, before anything is loaded."""

from dataclasses import replace
from types import MappingProxyType

import pytest
import torch

from streamblocks.checkpoints.lora_choice import LoraChoice
from streamblocks.families.kv_policies import KV_AUTO, KV_FP8, KV_PLAIN
from streamblocks.families.step_list import StepList
from streamblocks.ops.quantization import QuantizationSpec
from streamblocks.stream.going_on import check_recipe, seed_notice, settings_to_go_on, video_to_go_on
from streamblocks.stream.recipe import REPOSITORY_BLOCKS, Recipe
from streamblocks.stream.settings import StreamSettings
from streamblocks.stream.sinks import Mp4Sink
from streamblocks.stream.snapshot import StreamSnapshot

RECIPE = Recipe(model="/models/a", components="/models/parts", stamp="0a", device="cpu", dtype="float32")
SETTINGS = StreamSettings(width=64, height=32, seed=7)
ROLLING = StreamSettings(width=64, height=32, kv_policy="rolling", context_frames=4, sink_frames=1)


def snapshot(recipe=RECIPE, settings=SETTINGS, *, keys=False, position=6):
    layout = f'{{"stream_position": {position}' + (', "kv_cache": null}' if keys else "}")
    return StreamSnapshot(recipe, settings, 2, "a cat", layout, MappingProxyType({}))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {"model": "/models/b"},
            "a stream of model '/models/a' and the pipeline has '/models/b': choose '/models/a' in",
        ),
        ({"components": "/models/others"}, "a stream of vae '/models/parts' and the pipeline has '/models/others'"),
        ({"vae": "/vae/b.safetensors"}, "a stream of vae '/models/parts' and the pipeline has '/vae/b.safetensors'"),
        ({"revision": "main"}, "a stream of revision none and the pipeline has 'main': choose none"),
        ({"weights": "generator"}, "a stream of weights 'generator_ema' and the pipeline has 'generator'"),
        ({"dtype": "bfloat16"}, "a stream of dtype 'float32' and the pipeline has 'bfloat16'"),
        ({"device": "auto"}, "a stream of device 'cpu' and the pipeline has 'auto'"),
        ({"stamp": "0b"}, r"/models/a, whose files have changed since \(stamp 0a, now 0b\): run the sampler before"),
    ],
)
def test_another_model_is_named(changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        check_recipe(snapshot(), replace(RECIPE, **changes))


def test_blocks_of_another_kind_are_named():
    foreign = Recipe(model="/models/a", blocks=REPOSITORY_BLOCKS, device="cpu", dtype="float32")
    with pytest.raises(ValueError, match="of blocks 'built-in' and the pipeline has \"the repository's own\": choose"):
        check_recipe(snapshot(), foreign)


@pytest.mark.parametrize(
    "changes",
    [
        {"loras": (LoraChoice("/loras/a.safetensors"),)},
        {"quantization": QuantizationSpec(format="int8")},
        {"attention_backend": "_native_math"},
        {"compile": "transformer"},
        # Its stamp is another, too, and stands for the same model.
        {"text_encoder": "/text/b.safetensors", "stamp": "0b"},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_what_is_not_the_model_may_change(changes):
    check_recipe(snapshot(), replace(RECIPE, **changes))


@pytest.mark.parametrize(
    ("kept", "changes", "sentence"),
    [
        (SETTINGS, {"width": 32}, "width is 32 and the stream of go_on_from has 64: choose 64, or disconnect"),
        (SETTINGS, {"height": 64}, "height is 64 and the stream of go_on_from has 32: choose 32"),
        (SETTINGS, {"kv_policy": "rolling"}, "kv_policy is rolling and the stream of go_on_from has recompute"),
        (SETTINGS, {"context_frames": 6}, "context_frames is 6 and .* kept 3 for its context of 3: choose at most 3"),
        (ROLLING, {"context_frames": 3}, "context_frames is 3 and the stream of go_on_from has 4: choose 4"),
        (ROLLING, {"sink_frames": 0}, "sink_frames is 0 and the stream of go_on_from has 1: choose 1"),
        (ROLLING, {"frames_per_block": 1}, "frames_per_block is 1 and the stream of go_on_from has 3: choose 3"),
        (ROLLING, {"kv_format": KV_FP8}, "kv_format is FP8 and the stream of go_on_from has model's dtype: choose"),
    ],
)
def test_another_stream_is_named(kept, changes, sentence):
    past = snapshot(settings=kept, keys=kept is ROLLING)
    with pytest.raises(ValueError, match=sentence):
        settings_to_go_on(past, replace(kept, **changes))


def test_what_unknown_blocks_keep_is_as_it_was():
    past = snapshot(Recipe(model="/models/a", blocks=REPOSITORY_BLOCKS))
    with pytest.raises(ValueError, match="frames_per_block is 1 and the stream of go_on_from has 3"):
        settings_to_go_on(past, replace(SETTINGS, frames_per_block=1))


def test_settings_of_a_stream_that_goes_on():
    asked = replace(
        SETTINGS,
        seed=8,
        steps=2,
        blocks=5,
        shift=3.0,
        attention_bias=0.5,
        context_frames=2,
        kv_format=KV_FP8,
        frames_per_block=1,
        first_block_timesteps=StepList.parse("", "1000, 500"),
    )
    assert settings_to_go_on(snapshot(), asked) == replace(asked, seed=7)
    # As long a past as there is: a longer context has room for it.
    assert settings_to_go_on(snapshot(position=3), replace(SETTINGS, context_frames=9)).context_frames == 9
    # Decided by what is kept, not by the memory that is free now.
    kept = snapshot(settings=replace(ROLLING, kv_format=KV_FP8), keys=True)
    assert settings_to_go_on(kept, replace(ROLLING, kv_format=KV_AUTO)).kv_format == KV_FP8
    assert settings_to_go_on(snapshot(), replace(SETTINGS, kv_format=KV_AUTO)).kv_format == KV_AUTO
    assert SETTINGS.kv_format == KV_PLAIN


def test_a_seed_without_effect_is_said():
    assert seed_notice(snapshot(), SETTINGS) == []
    (notice,) = seed_notice(snapshot(), replace(SETTINGS, seed=8))
    assert notice == "seed 8 has no effect: the stream goes on with its own noise, that of seed 7."


def test_a_video_that_cannot_be_continued_is_named(tmp_path):
    file = tmp_path / "a.mp4"
    with pytest.raises(ValueError, match="was not written to a file: switch same_video off"):
        video_to_go_on(snapshot(), 16)
    kept = snapshot().with_video(file, 16.0, 21)
    with pytest.raises(FileNotFoundError, match=r"a\.mp4, is gone .*: run the sampler before this one again, or"):
        video_to_go_on(kept, 16)
    file.touch()
    with pytest.raises(
        OSError, match=r"a\.mp4, cannot be read as a video .*: run the sampler before this one again, or"
    ):
        video_to_go_on(kept, 16)
    for pictures in (9, 21):
        sink = Mp4Sink(file, fps=16)
        sink.write(torch.zeros((pictures, 32, 32, 3), dtype=torch.uint8))
        sink.close()
        if pictures == 9:
            with pytest.raises(OSError, match=r"a\.mp4, has 9 pictures and had 21: run the sampler before"):
                video_to_go_on(kept, 16)
    assert video_to_go_on(kept, 16) == file and kept.fps == 16
    with pytest.raises(ValueError, match="fps is 24 and the video before has 16: with same_video choose 16, or 0"):
        video_to_go_on(kept, 24)
