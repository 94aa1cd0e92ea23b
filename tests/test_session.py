"""The session against the plain deep-copying loop, and its memory."""

import copy

import av
import pytest
import torch
from diffusers.modular_pipelines import PipelineState

from streamblocks.benchmarks.deepcopied_tensors import count_deepcopied_tensors
from streamblocks.checkpoints.checkpoint_files import CheckpointError
from streamblocks.checkpoints.lora_choice import LoraChoice
from streamblocks.memory.cleanup import Handling, handling_table, parse_state_rules
from streamblocks.memory.tensor_bytes import held_tensor_bytes, live_tensor_bytes
from streamblocks.ops.quantization import QuantizationSpec
from streamblocks.stream.direction import Direction
from streamblocks.stream.materialise import materialise
from streamblocks.stream.recipe import REPOSITORY_BLOCKS, Recipe
from streamblocks.stream.residency import move_module
from streamblocks.stream.run_stream import run_stream
from streamblocks.stream.session import BlockFailedError, Session
from streamblocks.stream.settings import StreamSettings
from streamblocks.stream.sinks import Mp4Sink
from streamblocks.stream.state import StreamState

from foreign_repository import write_foreign_repository
from plain_loop import run_plain_loop

pytestmark = pytest.mark.usefixtures("no_pipeline")

PROMPTS = ["a cat", "a cat", "a dog on a red sofa", "a dog on a red sofa"]
POLICIES = {
    "recompute": {"kv_policy": "recompute"},
    "recompute, six context frames": {"kv_policy": "recompute", "context_frames": 6},
    "rolling": {"kv_policy": "rolling"},
    "rolling with sink": {"kv_policy": "rolling", "sink_frames": 1, "context_frames": 4},
}


def small(**changes):
    return StreamSettings(**({"width": 32, "height": 48, "steps": 2, "seed": 7} | changes))


def stream_frames(pipeline, settings, prompts):
    with Session(pipeline, settings) as session:
        return [session.run_block(prompt).frames for prompt in prompts]


@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES.keys())
def test_frames_equal_the_plain_loop(tiny_folder, policy):
    settings = small(**policy)
    pipeline = materialise(Recipe(model=str(tiny_folder)))
    streamed = stream_frames(pipeline, settings, PROMPTS)
    plain = run_plain_loop(pipeline.pipe, settings, PROMPTS)
    assert [len(frames) for frames in streamed] == [9, 12, 12, 12]
    for ours, theirs in zip(streamed, plain, strict=True):
        assert torch.equal(ours, theirs)


def test_policies_and_prompts_and_seeds_matter(tiny_folder):
    pipeline = materialise(Recipe(model=str(tiny_folder)))
    base = torch.cat(stream_frames(pipeline, small(), PROMPTS))
    assert torch.equal(base, torch.cat(stream_frames(pipeline, small(), PROMPTS)))
    assert not torch.equal(base, torch.cat(stream_frames(pipeline, small(kv_policy="rolling"), PROMPTS)))
    assert not torch.equal(base, torch.cat(stream_frames(pipeline, small(), ["a cat"] * 4)))
    assert not torch.equal(base, torch.cat(stream_frames(pipeline, small(seed=8), PROMPTS)))
    assert not torch.equal(base, torch.cat(stream_frames(pipeline, small(attention_bias=0.3), PROMPTS)))


@pytest.fixture
def foreign_recipe(tmp_path, tiny_folder, remote_code_allowed):
    folder = write_foreign_repository(tmp_path / "foreign", tiny_folder)
    return Recipe(model=str(folder), blocks=REPOSITORY_BLOCKS)


def test_foreign_frames_equal_the_plain_loop(foreign_recipe):
    settings = small(height=32)
    pipeline = materialise(foreign_recipe)
    streamed = stream_frames(pipeline, settings, PROMPTS)
    plain = run_plain_loop(pipeline.pipe, settings, PROMPTS)
    assert [len(frames) for frames in streamed] == [9, 12, 12, 12]
    for ours, theirs in zip(streamed, plain, strict=True):
        assert torch.equal(ours, theirs)
    # The cache counts: dropping it between blocks, as "delete every big key" would, gives other pictures.
    dropping = Recipe(
        model=foreign_recipe.model,
        blocks=REPOSITORY_BLOCKS,
        state_rules=parse_state_rules("decoder_cache = drop"),
    )
    broken = stream_frames(materialise(dropping), settings, PROMPTS)
    assert [len(frames) for frames in broken] == [9, 9, 9, 9]


@pytest.mark.parametrize("kind", ["recompute", "rolling", "foreign"])
def test_no_tensor_is_deep_copied(tiny_folder, foreign_recipe, kind):
    recipe = foreign_recipe if kind == "foreign" else Recipe(model=str(tiny_folder))
    settings = small(height=32, kv_policy="rolling" if kind == "rolling" else "recompute")
    pipeline = materialise(recipe)
    with count_deepcopied_tensors() as count:
        stream_frames(pipeline, settings, PROMPTS)
    assert (count.tensors, count.bytes) == (0, 0)
    with count_deepcopied_tensors() as count:
        run_plain_loop(pipeline.pipe, settings, PROMPTS)
    assert count.bytes > 0


@pytest.mark.parametrize("policy", [POLICIES["recompute"], POLICIES["rolling with sink"]], ids=["recompute", "rolling"])
def test_live_tensor_bytes_are_flat_over_100_blocks(tiny_folder, tmp_path, policy):
    pipeline = materialise(Recipe(model=str(tiny_folder)))
    sink = Mp4Sink(tmp_path / "long.mp4")
    live = {}
    with Session(pipeline, small(height=32, steps=1, **policy)) as session:
        for index in range(1, 101):
            block = session.run_block("a cat")
            sink.write(block.frames)
            if index in (5, 50, 100):
                live[index] = live_tensor_bytes()
    sink.close()
    assert live[100] == live[50] == live[5]
    with av.open(str(tmp_path / "long.mp4")) as container:
        assert sum(1 for _ in container.decode(video=0)) == 9 + 99 * 12


def test_closing_gives_all_of_the_streams_memory_back(tiny_folder):
    pipeline = materialise(Recipe(model=str(tiny_folder)))
    stream_frames(pipeline, small(), PROMPTS[:1])
    before = live_tensor_bytes()
    stream_frames(pipeline, small(), PROMPTS)
    assert live_tensor_bytes() == before


class Cancelled(BaseException):
    """As ComfyUI's own: not an `Exception`."""


def cancel_at(block, index):
    calls = []

    def on_pass(passed):
        calls.append(passed)
        if calls.count(0) == block + 1 and passed == index:
            raise Cancelled

    return on_pass


def test_cancel_twice_then_a_new_run(tiny_folder):
    pipeline = materialise(Recipe(model=str(tiny_folder)))
    expected = stream_frames(pipeline, small(), PROMPTS)
    before = live_tensor_bytes()
    for _ in range(2):
        made = []
        with (
            pytest.raises(Cancelled),
            Session(pipeline, small(), on_pass=cancel_at(block=2, index=1)) as session,
        ):
            for prompt in PROMPTS:
                made.append(session.run_block(prompt).frames)
        assert len(made) == 2
        assert torch.equal(torch.cat(made), torch.cat(expected[:2]))
        del made, session
        assert live_tensor_bytes() == before
    assert torch.equal(torch.cat(stream_frames(pipeline, small(), PROMPTS)), torch.cat(expected))


def test_nan_in_latents_stops_the_stream(tiny_folder):
    pipeline = materialise(Recipe(model=str(tiny_folder)))
    with Session(pipeline, small()) as session:
        session.run_block("a cat")
        weight = pipeline.pipe.transformer.proj_out.weight
        weight.data.fill_(float("nan"))
        with pytest.raises(BlockFailedError, match="block 2 has NaN"):
            session.run_block("a cat")


def test_nan_in_pictures_stops_the_stream(tiny_folder):
    pipeline = materialise(Recipe(model=str(tiny_folder)))
    with Session(pipeline, small()) as session:
        session.run_block("a cat")
        pipeline.pipe.vae.decoder.conv_out.weight.data.fill_(float("nan"))
        with pytest.raises(BlockFailedError, match="block 2 has NaN or infinite pictures"):
            session.run_block("a cat")


@pytest.mark.parametrize("format_", ["fp8", "int8"])
def test_quantized_weights_move_under_inference_mode(tiny_folder, format_):
    # As ComfyUI runs each prompt: its model management moves our weights from there.
    pipeline = materialise(Recipe(model=str(tiny_folder), dtype="bfloat16", quantization=QuantizationSpec(format_)))
    with torch.inference_mode():
        stream_frames(pipeline, small(), ["a cat"])
        transformer = pipeline.pipe.transformer
        move_module(transformer, torch.device("meta"))
        assert {p.device.type for p in transformer.parameters()} == {"meta"}
        assert not pipeline.is_resident()


class FailingSink:
    def write(self, frames):
        pass

    def close(self):
        raise OSError("no room")


class Watcher:
    def __init__(self, stop):
        self.stop = stop

    def while_loading(self, component, done, total):
        assert 0 < done <= total

    def before_pass(self, index):
        if self.stop:
            raise Cancelled

    def after_block(self, block):
        pass


@pytest.mark.parametrize(("stop", "expected"), [(True, Cancelled), (False, OSError)])
def test_a_failing_sink_hides_no_other_error(tiny_folder, tmp_path, stop, expected):
    pipeline = materialise(Recipe(model=str(tiny_folder)))
    video = Mp4Sink(tmp_path / "a.mp4")
    with pytest.raises(expected):
        run_stream(pipeline, small(blocks=1), Direction.constant("a cat"), [FailingSink(), video], Watcher(stop))
    # The sinks after the failing one are still closed.
    assert video.frames_written == (0 if stop else 9)
    assert not list(tmp_path.glob("*.plain.mp4"))


def test_long_prompt_is_said_and_cut(tiny_folder, caplog):
    pipeline = materialise(Recipe(model=str(tiny_folder)))
    with Session(pipeline, small()) as session:
        block = session.run_block("cat " * 3000)
    assert block.prompt_tokens_cut > 0
    assert "cut off" in caplog.text


def test_prompt_is_encoded_only_when_it_changes(tiny_folder):
    pipeline = materialise(Recipe(model=str(tiny_folder)))
    with Session(pipeline, small()) as session:
        calls = []
        session.run_block("a cat")
        hook = pipeline.pipe.text_encoder.register_forward_pre_hook(lambda *_: calls.append(1))
        for prompt in ("a cat", "a dog", "a dog", "a cat"):
            session.run_block(prompt)
        hook.remove()
    assert len(calls) == 2


def test_a_new_recipe_replaces_the_pipeline_before_loading(tiny_folder):
    first = materialise(Recipe(model=str(tiny_folder)))
    stream_frames(first, small(), ["a cat"])
    assert materialise(Recipe(model=str(tiny_folder))) is first
    live = live_tensor_bytes()
    second = materialise(Recipe(model=str(tiny_folder), dtype="bfloat16"))
    assert first.pipe.transformer is None
    assert live_tensor_bytes() < live / 10
    stream_frames(second, small(), ["a cat"])
    assert second.pipe.transformer.dtype == torch.bfloat16


def test_state_table():
    table = handling_table(parse_state_rules("mine = copy  # a note\n\nkv_cache=drop"))
    assert table["mine"] is Handling.COPY
    assert table["kv_cache"] is Handling.DROP
    assert handling_table()["kv_cache"] is Handling.SHARE
    with pytest.raises(ValueError, match="'kv_cache: drop' is not understood"):
        parse_state_rules("kv_cache: drop")


def test_stream_state_shares_drops_and_copies():
    cache, mine, other = torch.ones(3), [1], object()
    state = StreamState(handling=handling_table(parse_state_rules("mine = copy")))
    for key, value in {"kv_cache": cache, "mine": mine, "other": other, "videos": torch.ones(5)}.items():
        state.set(key, value, "kind" if key == "mine" else None)
    state.set("mine", mine, "kind")
    assert state.strip() == ["videos"]
    twin = copy.deepcopy(state)
    assert isinstance(twin, PipelineState)
    assert twin.kv_cache is cache and twin.get("other") is other
    assert twin.get("mine") == [1] and twin.get("mine") is not mine
    assert twin.get_by_kwargs("kind") == {"mine": [1]} and twin.kwargs_mapping == {"kind": ["mine"]}
    twin.set("new", 1)
    assert state.get("new") is None


def test_held_bytes_count_a_storage_once():
    tensor = torch.zeros(10)
    assert held_tensor_bytes({"a": tensor, "b": [tensor[2:], (tensor,)]}) == 40


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"width": 0}, "width is 0"),
        ({"height": -16}, "height is -16"),
        ({"blocks": 0}, "blocks is 0"),
        ({"steps": 0}, "steps is 0"),
        ({"shift": 0.0}, "shift is 0"),
        ({"kv_policy": "full"}, "kv_policy is 'full'"),
        ({"attention_bias": 0.0}, "attention_bias is 0"),
        ({"sink_frames": 4}, "sink_frames is 4"),
        ({"context_frames": 0}, "context_frames is 0"),
    ],
)
def test_bad_settings_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        small(**change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"width": 830}, "width is 830: choose a multiple of 16, such as 816 or 832"),
        ({"height": 8}, "height is 8: choose a multiple of 16, such as 16 or 32"),
    ],
)
def test_sizes_that_a_model_does_not_make_are_named_before_it_is_loaded(tiny_folder, tmp_path, change, message):
    pipeline = materialise(Recipe(model=str(tiny_folder)))
    with pytest.raises(ValueError, match=message):
        run_stream(
            pipeline, small(**change), Direction.constant("a cat"), [Mp4Sink(tmp_path / "x.mp4")], Watcher(False)
        )
    assert getattr(pipeline.pipe, "text_encoder", None) is None and not (tmp_path / "x.mp4").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": ""}, "model is empty"),
        ({"dtype": "int3"}, "dtype is 'int3'"),
        ({"attention_backend": "magic"}, "attention_backend is 'magic'"),
        ({"blocks": "mine"}, "blocks is 'mine'"),
    ],
)
def test_bad_recipes_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        Recipe(**({"model": "owner/x"} | change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"compile": "transformer"}, "compile is 'transformer', and the repository's own blocks do not use it"),
        ({"attention_backend": "flex"}, "attention_backend is 'flex', and .*, or for attention_backend 'native'"),
        ({"components": "/models/wan"}, "components is '/models/wan', and .*, or for components none"),
        ({"quantization": QuantizationSpec("fp8")}, "quantization is 'fp8', and"),
        ({"loras": (LoraChoice("/loras/a.safetensors"),)}, "lora is '/loras/a.safetensors', and"),
    ],
)
def test_what_a_repositorys_own_blocks_would_ignore_is_refused(change, message):
    Recipe("owner/x", blocks=REPOSITORY_BLOCKS, dtype="bfloat16", device="cpu")
    with pytest.raises(ValueError, match=message):
        Recipe("owner/x", blocks=REPOSITORY_BLOCKS, **change)


def test_unknown_models_and_devices_are_named(tiny_folder, tmp_path):
    with pytest.raises(CheckpointError, match="is not there"):
        materialise(Recipe(model=str(tmp_path / "nothing")))
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="lacks the sub-folder transformer"):
        materialise(Recipe(model=str(tmp_path / "empty")))
    (tmp_path / "model.pt").write_bytes(b"pickle")
    with pytest.raises(CheckpointError, match="so it is not opened"):
        materialise(Recipe(model=str(tmp_path / "model.pt")))
    with pytest.raises(CheckpointError, match=r"model\.pt"):
        materialise(Recipe(model=str(tmp_path / "model.pt"), components=str(tiny_folder)))
    with pytest.raises(ValueError, match="not available on this machine"):
        materialise(Recipe(model=str(tiny_folder), device="cuda:7"))
    with pytest.raises(ValueError, match="attention_backend is 'flash'"):
        materialise(Recipe(model=str(tiny_folder), attention_backend="flash"))
    with pytest.raises(ValueError, match="runs on CUDA"):
        materialise(Recipe(model=str(tiny_folder), attention_backend="_native_flash"))
