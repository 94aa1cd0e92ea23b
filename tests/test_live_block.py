"""Blocks that people see and change while they are made: what that costs, and that it can be made again to the bit."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from file_streams import Nobody
from test_steered_streams import CAT, DOG, place, video_of

from streamblocks.families.kv_policies import KV_INT8, RECOMPUTE_KEYS
from streamblocks.stream.direction import Direction
from streamblocks.stream.keep_frames import KeepFrames
from streamblocks.stream.live_block import LiveAttempt, LiveBlock
from streamblocks.stream.live_control import Edit, LiveControl
from streamblocks.stream.run_stream import run_stream
from streamblocks.stream.settings import StreamSettings
from streamblocks.stream.sinks import FrameKeeper
from streamblocks.stream.steering import Steering

# With a pass for the context, under "rolling" for the clean keys, three passes a block.
BLOCKS, STEPS = 3, 2
NEW = Edit(prompt=DOG)


class Page(Nobody):
    """Somebody who watches and steers: `asked` has edits by block, and by which pass that was begun in it, from 0."""

    def __init__(self, asked=None, *, watches=True):
        super().__init__()
        self.asked, self.control, self.block = dict(asked or {}), LiveControl(), -1
        self.told: list[int] = []
        self.passes: Counter[int] = Counter()
        self.shown: list[tuple[int, int, int, int]] = []
        self.parts: list[torch.Tensor] = []
        self.steering = Steering(self.control, tell=self.tell, show=self.show, is_watched=lambda: watches)

    def tell(self, index, direction):
        self.told.append(index)
        self.block = index

    def before_pass(self, index):
        edit = self.asked.pop((self.block, self.passes[self.block]), None)
        self.passes[self.block] += 1
        if edit is not None:
            self.control.edit(edit)

    def show(self, frames, first, of):
        self.shown.append((self.block, first, len(frames), of))
        self.parts.append(frames)


def stream(pipeline, page=None, direction=None, **settings):
    """Report and pictures of a stream that a page watches, or nobody."""
    page = page or Page(watches=False)
    keeper = FrameKeeper(KeepFrames.ALL)
    # One latent frame: decoding takes most of the time.
    lengths = {"blocks": BLOCKS, "steps": STEPS, "frames_per_block": 1, "context_frames": 1}
    made: dict[str, Any] = {"seed": 7, "kv_policy": "recompute", **lengths, **settings}
    report = run_stream(
        pipeline,
        StreamSettings(32, 32, **made),
        direction or Direction.of(CAT),
        [keeper],
        page,
        steering=page.steering,
        keep_stream=True,
    )
    return report, keeper.frames()


def same_snapshot(one, other):
    named = one.tensors, other.tensors
    return named[0].keys() == named[1].keys() and all(torch.equal(named[0][key], named[1][key]) for key in named[0])


ROLLING, VIDEO = {"kv_policy": "rolling"}, Edit(strength=0.25)
# By name: settings, the edit, in which block and pass it comes, and in which block it counts.
CASES = {
    "before the context's pass": ({}, NEW, 2, 0, 2),
    "in the last pass": ({}, NEW, 1, 2, 2),
    "in the first block": ({}, replace(NEW, attention_bias=0.5), 0, 1, 0),
    "into keys in 8 bits": (ROLLING | {"kv_format": KV_INT8}, NEW, 2, 1, 2),
    "with keys made anew": (ROLLING | {"on_prompt_change": RECOMPUTE_KEYS}, NEW, 2, 1, 2),
    "before deferred keys are written": (ROLLING | {"fuse_context": True}, NEW, 2, 0, 2),
    "once deferred keys are written": (ROLLING | {"fuse_context": True, "steps": 3}, NEW, 1, 1, 2),
    "into a video": (ROLLING, VIDEO, 2, 1, 2),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_an_early_edit_counts_in_its_block_and_gives_the_same_bits_again(pipeline, case):
    settings, edit, block, at, counts = case
    video = video_of() if edit is VIDEO else None
    page = Page({(block, at): edit})
    report, edited = stream(pipeline, page, Direction.of(CAT, video=video), **settings)
    is_early = counts == block
    assert page.steering.begun_again == is_early and report.by_hand
    assert page.told == sorted([*range(BLOCKS), *[block] * is_early])
    track = report.direction.as_track()
    again = Page(watches=False)
    played, replayed = stream(
        pipeline, again, Direction.of("", track=place(track.written(), BLOCKS), video=video), **settings
    )
    assert torch.equal(edited, replayed) and same_snapshot(report.snapshot, played.snapshot)
    # The passes that were begun before the edit was seen, and no others, were for nothing.
    assert page.passes - again.passes == Counter({block: at + 1} if is_early else {})
    assert not again.passes - page.passes
    names = [report.direction.name_of(index) for index in range(BLOCKS)]
    strengths = [report.direction.strength_of(index) for index in range(BLOCKS)]
    if edit is VIDEO:
        assert strengths == [0.5] * counts + [0.25] * (BLOCKS - counts)
    else:
        assert names == [CAT] * counts + [DOG] * (BLOCKS - counts)


def test_a_block_is_begun_again_once_however_often_it_is_edited(pipeline):
    asked = {(block, at): Edit(attention_bias=0.3 + 0.01 * (10 * block + at)) for block in (1, 2) for at in range(6)}
    page = Page(asked)
    stream(pipeline, page)
    assert page.steering.begun_again == 2
    assert page.told == [0, 1, 1, 2, 2] and [page.passes[block] for block in range(BLOCKS)] == [2, 4, 4]


PLANNED = {
    "a cut stays a cut": (f"0: {CAT}\n2 cut: a bird", 2, DOG, [CAT, CAT, DOG]),
    # The keys of the past are not made anew: its prompt has not gone.
    "a transition that is taken back": (f"0: {CAT}\n1->3: a bird", 1, CAT, [CAT, CAT, CAT]),
}


@pytest.mark.parametrize("planned", PLANNED.values(), ids=PLANNED)
def test_what_was_planned_for_the_block_counts_as_in_a_replay(pipeline, planned):
    track, block, prompt, names = planned
    page, settings = Page({(block, 1): Edit(prompt=prompt)}), ROLLING | {"on_prompt_change": RECOMPUTE_KEYS}
    report, edited = stream(pipeline, page, Direction.of("", track=place(track, BLOCKS)), **settings)
    assert page.steering.begun_again == 1 and report.direction.prompt_of(block).cut == ("cut" in track)
    assert [report.direction.name_of(index) for index in range(BLOCKS)] == names
    applied = report.direction.as_track().written()
    _, replayed = stream(pipeline, direction=Direction.of("", track=place(applied, BLOCKS)), **settings)
    assert torch.equal(edited, replayed)


@pytest.mark.parametrize("why", ["nobody watches", "unknown blocks", "stale keys"])
def test_otherwise_an_edit_counts_in_the_next_block(pipeline, monkeypatch, why):
    asked, settings, direction = {(1, 0): NEW}, {}, None
    page = Page(asked, watches=why != "nobody watches")
    if why == "unknown blocks":
        monkeypatch.setattr(type(pipeline.saving), "can_make_again", False)
    elif why == "stale keys":
        settings = ROLLING | {"on_prompt_change": RECOMPUTE_KEYS}
        direction = Direction.of("", track=place(f"0: {CAT}\n1: a bird", BLOCKS))
    report, _ = stream(pipeline, page, direction, **settings)
    assert page.steering.begun_again == 0 and page.told == [0, 1, 2]
    assert report.direction.name_of(1) != DOG and report.direction.name_of(2) == DOG
    assert bool(page.shown) == (why != "nobody watches")


def test_pictures_are_shown_latent_frame_by_latent_frame(pipeline):
    page, whole = Page(), {"blocks": 2, "steps": 1, "frames_per_block": 3}
    _, frames = stream(pipeline, page, **whole)
    first = [(0, 0, 1, 9), (0, 1, 4, 9), (0, 5, 4, 9)]
    assert page.shown == first + [(1, at, 4, 12) for at in (0, 4, 8)]
    _, unseen = stream(pipeline, **whole)
    assert torch.equal(torch.cat(page.parts), frames) and torch.equal(frames, unseen)


def test_pictures_that_are_not_finite_are_not_shown(pipeline, monkeypatch):
    from streamblocks.wan.vae import stream_decoder

    decode, page = stream_decoder.decode_latent_frame, Page()
    made: list[None] = []

    def spoil(*arguments):
        made.append(None)
        pixels = decode(*arguments)
        return pixels * float("nan") if len(made) == 5 else pixels

    monkeypatch.setattr(stream_decoder, "decode_latent_frame", spoil)
    report, frames = stream(pipeline, page, blocks=2, steps=1, frames_per_block=3)
    assert report.blocks_made == 1 and len(frames) == 9
    assert page.shown[3:] == [(1, 0, 4, 12), (1, 8, 4, 12)]


def test_an_edit_is_seen_before_the_next_layer(pipeline):
    """Of three passes of two layers, up to three quarters; not while the prompt's keys are made."""
    transformer = pipeline.pipe.transformer
    seen: list[None] = []

    def is_edited():
        seen.append(None)
        return False

    block = LiveBlock(is_edited=is_edited)
    attempt = LiveAttempt(block, {}, pipeline, StreamSettings(steps=2))
    nothing = torch.zeros(1, 0, 8)
    with attempt.watched():
        for layer in attempt._layers:
            for hook in layer._forward_pre_hooks.values():
                hook(layer, (nothing,))
        assert seen == []
        for _ in range(3):
            for hook in transformer._forward_pre_hooks.values():
                hook(transformer, ())
            for layer in attempt._layers:
                for hook in layer._forward_pre_hooks.values():
                    hook(layer, ())
    assert len(attempt._layers) == 2 and len(seen) == 4 and not attempt.is_given_up
    assert not transformer._forward_pre_hooks and not transformer._forward_hooks
