"""A stream whose attention bias a track says, block by block."""

import itertools

import pytest
import torch

from streamblocks.families.kv_policies import RECOMPUTE, ROLLING
from streamblocks.stream.direction import Direction
from streamblocks.stream.materialise import materialise
from streamblocks.stream.prompt_track import PromptTrack
from streamblocks.stream.recipe import REPOSITORY_BLOCKS, Recipe
from streamblocks.stream.run_stream import run_stream
from streamblocks.stream.session import Session
from streamblocks.stream.settings import StreamSettings

from foreign_repository import write_foreign_repository
from golden_wan import relative_error

CAT = "a cat"
BLOCKS = 4


@pytest.fixture(scope="module")
def pipeline(tiny_folder):
    return materialise(Recipe(model=str(tiny_folder)))


def small(**changes):
    return StreamSettings(**({"width": 32, "height": 32, "steps": 1, "seed": 7, "blocks": BLOCKS} | changes))


def directed(text, blocks=BLOCKS):
    return Direction.of(CAT, track=PromptTrack.parse(text).place(blocks, None))


class Sink:
    def __init__(self):
        self.frames = []

    def write(self, frames):
        self.frames.append(frames)

    def close(self):
        return None


class Watcher:
    def __init__(self):
        self.passes = []
        self.loaded = []

    def before_pass(self, index):
        self.passes.append(index)

    def while_loading(self, component, done, total):
        self.loaded.append(component)

    def after_block(self, block):
        self.passes.append("block")


def run(pipeline, direction, **settings):
    """Frames of each block, and how many passes of the transformer it took."""
    sink, watcher = Sink(), Watcher()
    report = run_stream(pipeline, small(**settings), direction, [sink], watcher)
    passes = [len(list(made)) for made_in, made in itertools.groupby(watcher.passes, type) if made_in is int]
    return sink.frames, passes, report


def latents_of(pipeline, direction, blocks=BLOCKS, **settings):
    """Latents of each block, and how many passes of the transformer they took."""
    made: list[torch.Tensor] = []
    passes: list[int] = []
    with Session(pipeline, small(**settings), passes.append) as session:
        for block in range(blocks):
            session.run_block(CAT, direction.inputs_of(block, 1.0))
            made.append(session._state.get("current_denoised_latents").clone())
    return made, len(passes)


@pytest.mark.parametrize(
    ("text", "policy", "saved"),
    [
        # The clean pass of every block but the last is taken along by the next one; that of the last is never made.
        ("2 bias 0.1:", {"kv_policy": ROLLING, "context_frames": 6, "sink_frames": 1}, BLOCKS),
        ("0 bias 0.1:\n2 bias 1:", {"kv_policy": ROLLING, "context_frames": 6}, BLOCKS),
        ("2 bias 0.1:", {"kv_policy": RECOMPUTE, "context_frames": 3}, BLOCKS - 1),
    ],
)
def test_a_changed_bias_in_fewer_passes_is_the_same(pipeline, text, policy, saved):
    """No clean pass has a bias, so the pass that takes the block before along needs none of its own."""
    direction = directed(text)
    apart, more = latents_of(pipeline, direction, **policy)
    together, fewer = latents_of(pipeline, direction, fuse_context=True, **policy)
    assert more - fewer == saved
    assert max(relative_error(ours, theirs) for ours, theirs in zip(together, apart, strict=True)) <= 1e-5
    # The bias counts from its block on: blocks before it are those of a stream that never has another.
    constant, _ = latents_of(pipeline, directed("0 bias 0.1:" if "\n" in text else "0 bias 1:"), blocks=3, **policy)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(apart[:2], constant[:2], strict=True))
    assert relative_error(apart[2], constant[2]) > 1e-3


def test_run_stream_takes_the_bias_of_the_track(pipeline):
    settings = {"kv_policy": ROLLING, "context_frames": 6}
    changed, passes, report = run(pipeline, directed("0: a cat\n2 bias 0.1:\n3 bias 1: a cat"), **settings)
    plain, same_passes, _ = run(pipeline, directed(f"0: {CAT}"), **settings)
    whole, _, _ = run(pipeline, directed("0 bias 0.1:"), **settings)
    biased, _, _ = run(pipeline, Direction.constant(CAT), attention_bias=0.1, **settings)
    assert passes == same_passes == [2] * BLOCKS and report.settings.attention_bias == 1.0
    assert [torch.equal(one, other) for one, other in zip(changed, plain, strict=True)] == [True] * 2 + [False] * 2
    assert torch.equal(torch.cat(whole), torch.cat(biased))


def test_a_backend_without_a_bias_is_refused_before_anything_is_loaded(tiny_folder, no_pipeline, monkeypatch):
    pipeline = materialise(Recipe(model=str(tiny_folder)))
    monkeypatch.setattr("streamblocks.stream.device_choice._NO_MASK", frozenset({"native"}))
    watcher = Watcher()
    with pytest.raises(ValueError, match=r"attention_bias is 0.3: the attention backend 'native' takes no bias"):
        run_stream(pipeline, small(), directed("0: a\n1 bias 0.3:\n2 bias 0.7: b"), [Sink()], watcher)
    assert watcher.loaded == []


def test_foreign_blocks_that_take_no_bias_are_told(tmp_path, tiny_folder, remote_code_allowed, no_pipeline):
    folder = write_foreign_repository(tmp_path / "foreign", tiny_folder)
    pipeline = materialise(Recipe(model=str(folder), blocks=REPOSITORY_BLOCKS))
    watcher = Watcher()
    with pytest.raises(ValueError, match=r"the track says bias 0.3, and the blocks of .* take no attention_bias"):
        run_stream(pipeline, small(blocks=3), directed("0: a\n1 bias 0.3: b", 3), [Sink()], watcher)
    assert watcher.passes == []
