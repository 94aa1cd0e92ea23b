"""Streams that go on from a snapshot are those that never stopped; the snapshot is a value that nobody changes."""

import copy
import hashlib
from collections import deque
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from file_streams import Nobody, Pictures

from streamblocks.families.kv_policies import KV_FP8, KV_INT8, RECOMPUTE_KEYS
from streamblocks.families.step_list import StepList
from streamblocks.memory.cleanup import STATE_RULES, Handling
from streamblocks.memory.tensor_bytes import held_tensor_bytes, live_tensor_bytes, storages_of, tensors_in
from streamblocks.stream import session as session_room
from streamblocks.stream.block_prompt import BlockPrompt
from streamblocks.stream.carried_state import CARRIED
from streamblocks.stream.direction import Direction
from streamblocks.stream.going_on import settings_to_go_on
from streamblocks.stream.materialise import materialise, release_materialised
from streamblocks.stream.recipe import REPOSITORY_BLOCKS, Recipe
from streamblocks.stream.run_stream import run_stream
from streamblocks.stream.session import BlockFailedError, Session
from streamblocks.stream.settings import StreamSettings
from streamblocks.stream.snapshot_tree import CannotSnapshotError, TreeReader, TreeWriter
from streamblocks.wan.vae.streaming_vae import EncoderCache, encode_pixel_frames

from foreign_repository import write_foreign_repository
from small_wan import make_components

CPU = torch.device("cpu")
# The prompt changes at the seam.
PROMPTS = ["a cat", "a cat", "a dog on a red sofa"]
CUT = 2
POLICIES: dict[str, dict[str, Any]] = {
    "recompute": {"kv_policy": "recompute"},
    "recompute, six context frames": {"kv_policy": "recompute", "context_frames": 6},
    "recompute in 8 bits": {"kv_policy": "recompute", "kv_format": KV_FP8},
    "rolling": {"kv_policy": "rolling"},
    "rolling with sink": {"kv_policy": "rolling", "sink_frames": 1, "context_frames": 4},
    "rolling with sink, in 8 bits": {
        "kv_policy": "rolling",
        "sink_frames": 1,
        "context_frames": 4,
        "kv_format": KV_FP8,
    },
    "rolling with sink, in 8 bits, in fewer passes": {
        "kv_policy": "rolling",
        "sink_frames": 1,
        "context_frames": 4,
        "kv_format": KV_INT8,
        "fuse_context": True,
    },
    "rolling, keys computed anew": {"kv_policy": "rolling", "on_prompt_change": RECOMPUTE_KEYS},
}


def small(**changes):
    return StreamSettings(**({"width": 32, "height": 32, "steps": 2, "seed": 7} | changes))


@pytest.fixture(scope="module", autouse=True)
def nothing_estimated():
    """What a stream takes is not the subject, and finding out takes ten times as long as a block."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("streamblocks.wan.rehearsal.rehearse_streaming_bytes", lambda *_: 0)
        yield


@pytest.fixture(scope="module")
def recipe(tiny_folder):
    return Recipe(model=str(tiny_folder))


def go_on(recipe, snapshot, prompts, **changes):
    settings = settings_to_go_on(snapshot, replace(snapshot.settings, **changes))
    with Session(materialise(recipe), settings, going_on=snapshot) as session:
        return [session.run_block(prompt).frames for prompt in prompts]


def kept_stream(recipe, settings, prompts=PROMPTS[:CUT]):
    with Session(materialise(recipe), settings) as session:
        for prompt in prompts:
            session.run_block(prompt)
        return session.snapshot()


def digest(snapshot):
    content = [tensor.contiguous().view(torch.uint8).numpy().tobytes() for tensor in snapshot.tensors.values()]
    return hashlib.sha256(b"".join([snapshot.layout.encode(), *content])).hexdigest()


def storages(value):
    """Where the tensors in a value lie."""
    return set(storages_of(tensors_in(value)))


def same(ours, theirs):
    return all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("policy", POLICIES)
def test_a_stream_that_goes_on_is_the_one_that_never_stopped(recipe, policy):
    with Session(materialise(recipe), small(**POLICIES[policy])) as session:
        uncut = [session.run_block(prompt).frames for prompt in PROMPTS[:CUT]]
        # The session goes on, too: this run is also that of a stream of which nothing was kept.
        snapshot = session.snapshot()
        uncut += [session.run_block(prompt).frames for prompt in PROMPTS[CUT:]]
    assert (snapshot.blocks_made, snapshot.position, snapshot.prompt) == (CUT, 3 * CUT, PROMPTS[CUT - 1])
    before = digest(snapshot)
    other = go_on(recipe, snapshot, ["a cat"])
    assert not torch.equal(other[0], uncut[CUT])
    # From the same value, after another stream went on from it; whatever the seed says.
    assert same(go_on(recipe, snapshot, PROMPTS[CUT:], seed=99), uncut[CUT:])
    assert digest(snapshot) == before


@pytest.mark.parametrize("policy", ["recompute, six context frames", "rolling with sink"])
def test_any_block_is_a_place_to_go_on_from(recipe, policy):
    """The first, whose window is not full; and one made by a session that itself went on, on a pipeline made anew."""
    settings = small(**POLICIES[policy])
    with Session(materialise(recipe), settings) as session:
        uncut = [session.run_block("a cat").frames for _ in range(4)]
    first = kept_stream(recipe, settings, ["a cat"])
    release_materialised()
    with Session(materialise(recipe), settings, going_on=first) as session:
        again = [session.run_block("a cat").frames for _ in range(2)]
        third = session.snapshot()
    assert (third.blocks_made, third.position) == (3, 9)
    assert same(again + go_on(recipe, third, ["a cat"]), uncut[1:])


@pytest.mark.parametrize("policy", ["recompute", "rolling with sink, in 8 bits, in fewer passes"])
def test_a_cut_drops_the_past_of_a_stream_that_goes_on(recipe, policy):
    cut = BlockPrompt(((PROMPTS[CUT], 1.0),), cut=True)
    with Session(materialise(recipe), small(**POLICIES[policy])) as session:
        for prompt in PROMPTS[:CUT]:
            session.run_block(prompt)
        snapshot = session.snapshot()
        uncut = [session.run_block(prompt).frames for prompt in (cut, "a cat")]
    assert len(uncut[0]) == 9
    assert same(go_on(recipe, snapshot, [cut, "a cat"]), uncut)


def bytes_of_kept_keys(cache, frames, bytes_each):
    """Of the window that the next block sees; more is in the cache."""
    assert cache.length == 6 * cache.tokens_per_frame
    heads, head_dim = cache.keys[0].shape[2:]
    scale = 4 if bytes_each == 1 else 0
    return len(cache.keys) * 2 * frames * cache.tokens_per_frame * heads * (head_dim * bytes_each + scale)


@pytest.mark.parametrize("policy", ["recompute", "rolling with sink", "rolling with sink, in 8 bits"])
def test_a_snapshot_holds_what_the_next_block_needs_and_nothing_else(recipe, policy):
    pipeline = materialise(recipe)
    with Session(pipeline, small(**POLICIES[policy])) as warm:
        warm.run_block("a cat")
    before = live_tensor_bytes()
    session = Session(pipeline, small(**POLICIES[policy]))
    for prompt in PROMPTS[:CUT]:
        session.run_block(prompt)
    state = session._state.values
    snapshot = session.snapshot()
    names = ["current_denoised_latents", "frame_cache_context", "decoder_cache", "sink_latents"]
    expected = sum(held_tensor_bytes(state.get(name)) for name in names) + session._generator.get_state().nbytes
    if "rolling" in policy:
        expected += bytes_of_kept_keys(state["kv_cache"], frames=4, bytes_each=1 if "8 bits" in policy else 4)
    assert snapshot.bytes == sum(tensor.nbytes for tensor in snapshot.tensors.values()) == expected
    assert not storages(dict(snapshot.tensors)) & storages(pipeline.carried_state(state, session.settings))
    for start in (snapshot.start_entries(pipeline), snapshot.start_entries(pipeline)):
        assert not storages(dict(snapshot.tensors)) & storages(start)
        state["elsewhere"] = start
    del start, state
    session.close()
    del session
    assert live_tensor_bytes() - before == expected


def test_what_is_carried_has_a_rule():
    handling = {rule.key: rule.handling for rule in STATE_RULES}
    assert {handling[key] for key in CARRIED} == {Handling.SHARE}


def test_a_shorter_context_goes_on_and_other_choices_may_change(recipe):
    snapshot = kept_stream(recipe, small(context_frames=6))
    plain = go_on(recipe, snapshot, ["a cat"])
    others = {"context_frames": 3, "shift": 3.0, "frames_per_block": 2}
    for name, value in others.items():
        changed = go_on(recipe, snapshot, ["a cat"], **{name: value})
        assert not torch.equal(changed[0], plain[0]), name


def test_a_stream_is_kept_after_complete_blocks_only(recipe, monkeypatch):
    session = Session(materialise(recipe), small())
    with pytest.raises(ValueError, match="its last block is not complete"):
        session.snapshot()
    session.run_block("a cat")
    monkeypatch.setattr(session_room, "check_finite", lambda *_: (_ for _ in ()).throw(BlockFailedError("bad")))
    with pytest.raises(BlockFailedError):
        session.run_block("a cat")
    with pytest.raises(ValueError, match="its last block is not complete"):
        session.snapshot()
    session.close()
    with pytest.raises(ValueError, match="the session is closed"):
        session.snapshot()


def streamed(recipe, settings, direction, **keep):
    pictures = Pictures()
    return run_stream(materialise(recipe), settings, direction, [pictures], Nobody(), **keep), pictures.blocks


def test_runs_go_on_from_runs(recipe):
    prompt_of = PROMPTS.__getitem__
    # Timesteps of a first block are for a block without a past, which the second run has none of.
    settings = small(blocks=CUT, first_block_timesteps=StepList.parse("", "1000, 700, 400"))
    whole, uncut = streamed(recipe, replace(settings, blocks=3), Direction(prompt_of))
    assert (whole.snapshot, whole.no_snapshot) == (None, "no snapshot was asked for.")
    first, made = streamed(recipe, settings, Direction(prompt_of), keep_stream=True)
    assert "snapshot" not in first.as_dict() and "no_snapshot" not in first.as_dict()
    direction = Direction(lambda index: PROMPTS[CUT + index], go_on=first.snapshot)
    second, more = streamed(recipe, replace(settings, seed=3, blocks=1), direction, keep_stream=True)
    assert same(made + more, uncut)
    assert (second.blocks_made, second.snapshot.blocks_made, second.snapshot.settings.seed) == (1, 3, 7)
    with pytest.raises(ValueError, match="width is 48 and the stream of go_on_from has 32: choose 32"):
        streamed(recipe, replace(settings, width=48), direction)


@pytest.fixture
def foreign_recipe(tmp_path, tiny_folder, remote_code_allowed, no_pipeline):
    folder = write_foreign_repository(tmp_path / "foreign", tiny_folder)
    return Recipe(model=str(folder), blocks=REPOSITORY_BLOCKS)


def test_foreign_blocks_go_on_or_say_why_not(foreign_recipe):
    pipeline = materialise(foreign_recipe)
    with Session(pipeline, small(blocks=4)) as session:
        uncut = [session.run_block("a cat").frames for _ in range(2)]
        snapshot = session.snapshot()
        uncut.append(session.run_block("a dog").frames)
        session._state.values["tracker"] = object()
        with pytest.raises(CannotSnapshotError, match=r"tracker in its state is a object, .* 'tracker = drop'"):
            session.snapshot()
    assert snapshot.keeps_keys
    assert same(go_on(foreign_recipe, snapshot, ["a dog"]), uncut[2:])


def test_a_stream_is_not_lost_for_want_of_a_snapshot(recipe, monkeypatch):
    pipeline = materialise(recipe)
    monkeypatch.setattr(pipeline, "carried_state", lambda state, settings: {"odd": {object(): 1}})
    report, made = streamed(recipe, small(blocks=1), Direction.constant("a cat"), keep_stream=True)
    assert report.snapshot is None and "odd in its state is a object" in report.no_snapshot
    assert len(made) == report.blocks_made == 1


def test_a_snapshot_leaves_room_in_ram(recipe, monkeypatch):
    with Session(materialise(recipe), small()) as session:
        session.run_block("a cat")
        size = session.snapshot().bytes
        monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=2 * size - 1))
        with pytest.raises(MemoryError, match=r"a copy of the stream's past takes 0\.0 GB of RAM and 0\.0 GB are free"):
            session.snapshot()
        monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=2 * size))
        assert session.snapshot().bytes == size


def test_a_stream_with_an_unusable_block_cannot_go_on(recipe, monkeypatch):
    def check(state, block, explain):
        if block == 1:
            raise BlockFailedError("block 1 is bad")

    monkeypatch.setattr(session_room, "check_finite", check)
    report, made = streamed(recipe, small(), Direction.constant("a cat"), keep_stream=True)
    assert report.blocks_made == len(made) == 1 and report.snapshot is None
    assert report.no_snapshot == "it ended with a block that is unusable: block 1 is bad"


def test_values_come_back_as_they_were():
    shared = torch.arange(6.0).reshape(2, 3)
    values: dict[str, Any] = {
        "numbers": [1, 2.5, True, None, "text", (1, "a")],
        "twice": {0: shared, "b": [shared]},
        "transposed": shared.t(),
        "bits": shared.to(torch.float8_e4m3fn),
        "pictures": deque([torch.ones(2), torch.zeros(1)], maxlen=3),
        "generator": torch.Generator().manual_seed(5),
    }
    expected = copy.deepcopy({name: value for name, value in values.items() if name != "generator"})
    writer = TreeWriter(CPU)
    written = writer.write(values)
    shared.zero_()
    made = TreeReader(writer.tensors, CPU, {}).read(written)
    assert made["numbers"] == expected["numbers"] and type(made["numbers"][5]) is tuple
    assert made["twice"][0] is made["twice"]["b"][0]
    assert torch.equal(made["twice"][0], expected["twice"][0])
    assert torch.equal(made["transposed"], expected["transposed"]) and made["transposed"].stride() == (1, 3)
    assert torch.equal(made["bits"].float(), expected["bits"].float()) and made["bits"].dtype is torch.float8_e4m3fn
    assert made["pictures"].maxlen == 3 and same(made["pictures"], expected["pictures"])
    drawn = (torch.rand(4, generator=generator) for generator in (made["generator"], torch.Generator().manual_seed(5)))
    assert torch.equal(*drawn)
    with pytest.raises(ValueError, match="holds a EncoderCache, which this pipeline does not know"):
        TreeReader({}, CPU, {}).read('{"cache": {"kind": "EncoderCache", "parts": {"dict": []}}}')
    with pytest.raises(ValueError, match="drew its noise on cuda and this pipeline is on cpu"):
        TreeReader({}, CPU, {}).read('{"generator": {"generator": "generator", "device": "cuda"}}')


def test_a_video_that_is_read_goes_on_too():
    """The state of a video input: features of the encoder, and pictures that are no whole latent frame."""
    vae = make_components()[1]
    video = torch.rand((1, 3, 15, 32, 32), generator=torch.Generator().manual_seed(3)) * 2 - 1
    cache = EncoderCache.for_vae(vae)
    encode_pixel_frames(vae, video[:, :, :8], cache)
    writer = TreeWriter(CPU)
    written = writer.write({"encoder_cache": cache})
    expected = encode_pixel_frames(vae, video[:, :, 8:], cache)
    for _ in range(2):
        reader = TreeReader(writer.tensors, CPU, {"EncoderCache": EncoderCache.from_snapshot})
        again = reader.read(written)["encoder_cache"]
        assert again.held.shape[2] == 3
        assert torch.equal(encode_pixel_frames(vae, video[:, :, 8:], again), expected)


def test_a_cut_behind_the_seam_begins_as_any_other(recipe):
    """With the first block's own timesteps, which the blocks before it do without."""
    settings = small(steps=1, first_block_timesteps=StepList.parse("", "1000, 700, 400"))
    cut = BlockPrompt((("a dog", 1.0),), cut=True)
    with Session(materialise(recipe), settings) as session:
        session.run_block("a cat")
        snapshot = session.snapshot()
        uncut = [session.run_block("a cat").frames, session.run_block(cut).frames]
    assert same(go_on(recipe, snapshot, ["a cat", cut], blocks=2), uncut)


def test_other_embeddings_at_the_seam_are_another_prompt(recipe):
    """The keys of the past are computed anew for them, be it behind a prompt or behind other embeddings."""
    pipeline = materialise(recipe)
    settings = small(kv_policy="rolling", on_prompt_change=RECOMPUTE_KEYS, blocks=1)
    cat, dog = (torch.randn((1, 7, 48), generator=torch.Generator().manual_seed(seed)) for seed in (1, 2))
    text, _ = streamed(recipe, settings, Direction.constant("a cat"), keep_stream=True)
    given, _ = streamed(recipe, settings, Direction.of("", cat), keep_stream=True)
    for embeds, report, changed in ((cat, text, True), (dog, given, True), (cat, given, False)):
        passes: list[int] = []
        hook = pipeline.pipe.transformer.register_forward_pre_hook(lambda *_, passes=passes: passes.append(1))
        streamed(recipe, settings, Direction.of("", embeds, go_on=report.snapshot))
        hook.remove()
        # Two steps and the clean pass; one more for the keys of the block before.
        assert len(passes) == 3 + changed


def test_foreign_blocks_count_from_the_cut_behind_the_seam(foreign_recipe):
    cut = BlockPrompt((("a dog", 1.0),), cut=True)
    asked = []
    pipeline = materialise(foreign_recipe)
    with Session(pipeline, small()) as session:
        for prompt in ("a cat", cut):
            session.run_block(prompt)
        snapshot = session.snapshot()
        uncut = session._call_inputs("a dog")["block_idx"]
    with Session(pipeline, settings_to_go_on(snapshot, small()), going_on=snapshot) as session:
        asked.append(session._call_inputs("a dog")["block_idx"])
        session.run_block("a dog")
        again = session.snapshot()
    assert asked == [uncut] == [1] and (again.blocks_made, again.scene_began) == (3, 1)
