"""A session along a prompt track: prompts encoded ahead, mixes, keys of the past, hard cuts."""

import pytest
import torch

from streamblocks.families.kv_policies import KEEP_KEYS, RECOMPUTE, RECOMPUTE_KEYS, ROLLING
from streamblocks.stream.block_prompt import BlockPrompt
from streamblocks.stream.conditioning import fit_tokens
from streamblocks.stream.direction import Direction
from streamblocks.stream.materialise import materialise
from streamblocks.stream.mixed_embeds import mix_embeds, slerp_tokens
from streamblocks.stream.pipelines import BuiltInPipeline
from streamblocks.stream.prompt_track import PromptTrack
from streamblocks.stream.recipe import REPOSITORY_BLOCKS, Recipe
from streamblocks.stream.run_stream import run_stream
from streamblocks.stream.session import Session
from streamblocks.stream.settings import StreamSettings

from foreign_repository import write_foreign_repository

CAT, DOG = "a cat", "a dog on a red sofa"


@pytest.fixture(scope="module")
def pipeline(tiny_folder):
    return materialise(Recipe(model=str(tiny_folder)))


def small(**changes):
    return StreamSettings(**({"width": 32, "height": 32, "steps": 1, "seed": 7} | changes))


def place(text, blocks, interpolation="linear"):
    return PromptTrack.parse(text, interpolation).place(blocks, None)


def stream(pipeline, track, blocks, **settings):
    """Frames of each block, and how many passes of the transformer it took."""
    frames, passes = [], []
    counted: list[int] = []
    with Session(pipeline, small(**settings), prompts_ahead=track.texts) as session:
        for index in range(blocks):
            session.on_pass = counted.append
            frames.append(session.run_block(track.at(index)).frames)
            passes.append(len(counted))
            counted.clear()
    return frames, passes


def manual_embeds(pipeline, text):
    """As a lone text step of the pipeline gives them, with their padding."""
    with Session(pipeline, small()) as session:
        pipeline.encode_prompt(session._state, text)
        return session._state.get("prompt_embeds").clone()


class Sink:
    def __init__(self):
        self.frames = []

    def write(self, frames):
        self.frames.append(frames)

    def close(self):
        return None


class Watcher:
    def __init__(self, on_pass=lambda index: None):
        self.before_pass = on_pass
        self.prompts = []

    def while_loading(self, component, done, total):
        pass

    def after_block(self, block):
        self.prompts.append(block.prompt)


def test_a_track_is_encoded_once_before_the_first_block_and_equals_its_prompts(tiny_folder, no_pipeline, monkeypatch):
    pipeline = materialise(Recipe(model=str(tiny_folder)))
    assert isinstance(pipeline, BuiltInPipeline)
    events: list[str] = []
    bring = pipeline._store.bring

    def note_bring(names, working_bytes):
        events.append(f"bring {'+'.join(names)}")
        bring(names, working_bytes)

    monkeypatch.setattr(pipeline._store, "bring", note_bring)
    pipeline._load("text_encoder").register_forward_pre_hook(lambda *_: events.append("encode"))
    events.clear()
    track = place(f"0: {CAT}\n1: {DOG}\n2->3: {CAT}", 4)
    sink, watcher = Sink(), Watcher(lambda index: events.append("pass"))
    direction = Direction.of("ignored", track=track)
    assert direction.describe() == {"prompt": "(from the track)", "track": track.describe()}
    report = run_stream(pipeline, small(blocks=4), direction, [sink], watcher)
    before = events[: events.index("pass")]
    encoding = ["bring text_encoder", "encode", "encode"]
    assert before == [*encoding, "bring transformer", "bring vae", "bring transformer+vae"]
    assert events.count("encode") == 2
    assert watcher.prompts == [
        CAT,
        DOG,
        f"{DOG} -> 0.5 {DOG} + 0.5 {CAT}",
        f"0.5 {DOG} + 0.5 {CAT} -> {CAT}",
    ]
    assert report.blocks_made == 4 and report.notices == ()
    with Session(pipeline, small()) as session:
        plain = [session.run_block(prompt).frames for prompt in (CAT, DOG)]
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(sink.frames, plain, strict=False))


def test_a_mix_is_that_of_the_embeddings(pipeline):
    cat, dog = (manual_embeds(pipeline, text) for text in (CAT, DOG))
    assert 0 < cat[0].any(-1).sum() < dog[0].any(-1).sum() < dog.shape[1]
    track = place(f"0: {CAT} :1 || {DOG} :3", 1)
    frames, _ = stream(pipeline, track, 1)
    given = pipeline.start_from_embeds(0.25 * cat + 0.75 * dog)
    with Session(pipeline, small(), start_from=given) as session:
        assert torch.equal(session.run_block(given["encoded_prompt"]).frames, frames[0])
    with Session(pipeline, small()) as session:
        # Prompts that nobody told beforehand.
        assert torch.equal(session.run_block(track.at(0)).frames, frames[0])
        assert torch.equal(session._state.get("prompt_embeds"), 0.25 * cat + 0.75 * dog)
    frames_of_slerp, _ = stream(pipeline, place(f"0: {CAT} :1 || {DOG} :3", 1, "slerp"), 1)
    assert not torch.equal(frames_of_slerp[0], frames[0])


def test_slerp_goes_along_the_arc_and_keeps_padding():
    angles = torch.tensor([0.3, 1.0, 3.0])
    start = torch.tensor([[1.0, 0.0]]).repeat(3, 1)[None]
    end = torch.stack([angles.cos(), angles.sin()], dim=-1)[None]
    expected = torch.stack([(0.25 * angles).cos(), (0.25 * angles).sin()], dim=-1)[None]
    torch.testing.assert_close(slerp_tokens(start, end, 0.25), expected)
    torch.testing.assert_close(slerp_tokens(start, start, 0.25), start)
    # A longer prompt's tokens have no arc from nothing; padding of both stays nothing.
    words, short = torch.randn(1, 4, 8), torch.randn(1, 2, 8)
    mixed = mix_embeds([(fit_tokens(short, 6), 0.75), (words, 0.25)], "slerp")
    assert mixed.shape == (1, 6, 8) and not mixed[:, 4:].any()
    torch.testing.assert_close(mixed[:, 2:4], 0.25 * words[:, 2:])
    # A third joins what is mixed so far.
    whole = mix_embeds([(start, 0.25), (end, 0.25), (start, 0.5)], "slerp")
    torch.testing.assert_close(whole, slerp_tokens(slerp_tokens(start, end, 0.5), start, 0.5))


@pytest.mark.parametrize(
    ("choice", "passes"),
    [
        # One denoising step and one clean pass; anew two blocks of the window more, once for the whole transition.
        (KEEP_KEYS, [2, 2, 2, 2, 2, 2]),
        (RECOMPUTE_KEYS, [2, 2, 4, 2, 2, 4]),
    ],
)
def test_keys_of_the_past_are_kept_or_computed_anew(pipeline, choice, passes):
    track = place(f"0: {CAT}\n2: {DOG}\n3->4: {CAT}", 6)
    settings = {"kv_policy": ROLLING, "context_frames": 6, "on_prompt_change": choice}
    frames, counted = stream(pipeline, track, 6, **settings)
    assert counted == passes
    kept, _ = stream(pipeline, track, 3, kv_policy=ROLLING, context_frames=6)
    assert [torch.equal(one, other) for one, other in zip(frames, kept, strict=False)] == [
        True,
        True,
        choice == KEEP_KEYS,
    ]


def test_recompute_has_no_keys_to_keep(pipeline):
    track = place(f"0: {CAT}\n2: {DOG}", 3)
    kept, few = stream(pipeline, track, 3, kv_policy=RECOMPUTE)
    anew, many = stream(pipeline, track, 3, kv_policy=RECOMPUTE, on_prompt_change=RECOMPUTE_KEYS)
    assert few == many == [1, 2, 2]
    assert torch.equal(torch.cat(kept), torch.cat(anew))


@pytest.mark.parametrize(
    ("policy", "change", "passes"),
    [
        # Within a transition past and block read other texts, so each has a pass of its own.
        (RECOMPUTE, KEEP_KEYS, [1, 1, 2, 2, 1]),
        # A block's clean pass comes before the next prompt does.
        (ROLLING, KEEP_KEYS, [1, 1, 2, 2, 2]),
        # Those of a deferred block are among the keys that are computed anew.
        (ROLLING, RECOMPUTE_KEYS, [1, 1, 2, 2, 3]),
    ],
)
def test_a_transition_in_fewer_passes_is_the_same(pipeline, policy, change, passes):
    track = place(f"0: {CAT}\n2->3: {DOG}", 5)
    settings = {"kv_policy": policy, "on_prompt_change": change, "context_frames": 6 if policy == ROLLING else 3}
    apart, _ = stream(pipeline, track, 5, **settings)
    together, counted = stream(pipeline, track, 5, fuse_context=True, **settings)
    assert counted == passes
    assert (torch.cat(apart).int() - torch.cat(together).int()).abs().max() <= 1


@pytest.mark.parametrize("policy", [RECOMPUTE, ROLLING])
def test_behind_a_cut_comes_what_a_new_session_makes(pipeline, policy):
    settings = small(kv_policy=policy, sink_frames=1, on_prompt_change=RECOMPUTE_KEYS)
    with Session(pipeline, settings) as session:
        session.run_block(CAT)
        session.run_block(CAT)
        generator = torch.Generator()
        generator.set_state(session._generator.get_state())
        behind = [session.run_block(BlockPrompt(((DOG, 1.0),), cut=True)), session.run_block(DOG)]
    with Session(pipeline, settings, start_from={"generator": generator}) as fresh:
        alone = [fresh.run_block(DOG).frames for _ in range(2)]
    assert [block.index for block in behind] == [2, 3]
    assert [len(block.frames) for block in behind] == [9, 12]
    assert all(torch.equal(block.frames, frames) for block, frames in zip(behind, alone, strict=True))


def test_foreign_blocks_take_one_prompt_each(tmp_path, tiny_folder, remote_code_allowed, no_pipeline):
    folder = write_foreign_repository(tmp_path / "foreign", tiny_folder)
    pipeline = materialise(Recipe(model=str(folder), blocks=REPOSITORY_BLOCKS))
    frames, _ = stream(pipeline, place(f"0: {CAT}\n1 cut: {DOG}", 2), 2)
    with Session(pipeline, small()) as session:
        assert torch.equal(session.run_block(CAT).frames, frames[0])
        generator = session._generator
        with Session(pipeline, small(), start_from={"generator": generator}) as fresh:
            assert torch.equal(fresh.run_block(DOG).frames, frames[1])
    passes: list[int] = []
    mixed = Direction.of("", track=place(f"0: {CAT}\n1->2: {DOG}", 3))
    with pytest.raises(ValueError, match=r"a block mixes several prompts, and the blocks of .* encode the prompt"):
        run_stream(pipeline, small(blocks=3), mixed, [Sink()], Watcher(passes.append))
    assert passes == []
