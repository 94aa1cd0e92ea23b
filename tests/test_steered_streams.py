"""Streams that are edited, paused and stopped; what was done, written as a track, gives the same bits."""

from fractions import Fraction
from threading import Thread

import pytest
import torch
from file_streams import Nobody

from streamblocks.stream.direction import Direction
from streamblocks.stream.keep_frames import KeepFrames
from streamblocks.stream.live_control import Allowed, Edit, LiveControl
from streamblocks.stream.picture_sources import PictureBatch
from streamblocks.stream.prompt_track import PromptTrack
from streamblocks.stream.run_stream import run_stream
from streamblocks.stream.settings import StreamSettings
from streamblocks.stream.sinks import FrameKeeper
from streamblocks.stream.steering import Steering
from streamblocks.stream.video_input import VideoInput

FPS = Fraction(16)
POLICIES = ("recompute", "rolling")
CAT, DOG = "a cat", 'a "dog" || on\na red sofa'


class CancelledError(BaseException):
    """As ComfyUI's."""


def place(text, blocks=None):
    return PromptTrack.parse(text).place(blocks, None)


def stream(pipeline, policy, blocks=4, asked=None, look=lambda: None, endless=False, **direction):
    """Report and pictures; before block k, `asked[k]` is asked of the control, as a page might."""
    control, keeper = LiveControl(), FrameKeeper(KeepFrames.ALL)

    def ask(index, direction):
        # Told before block `index`: what is asked now counts from the next one.
        for action in (asked or {}).get(index + 1, ()):
            action(control)

    for action in (asked or {}).get(0, ()):
        action(control)
    settings = StreamSettings(32, 32, blocks=blocks, steps=1, seed=7, kv_policy=policy, endless=endless)
    steering = Steering(control, look, ask)
    report = run_stream(
        pipeline, settings, Direction.of(CAT, **direction), [keeper], Nobody(), keep_stream=True, steering=steering
    )
    return report, keeper.frames()


def edit(**values):
    return lambda control: control.edit(Edit(**values))


def video_of():
    images = torch.rand((57, 32, 32, 3), generator=torch.Generator().manual_seed(3))
    return VideoInput(PictureBatch("video", images, FPS), FPS, 0.5)


EDITS = {
    "a prompt": {2: [edit(prompt=DOG)]},
    "the first block's prompt": {0: [edit(prompt=DOG)]},
    "a bias": {1: [edit(attention_bias=0.3)], 3: [edit(attention_bias=1.0)]},
    "all of it": {1: [edit(prompt=DOG, strength=0.2)], 2: [edit(attention_bias=0.5)], 3: [edit(prompt=CAT)]},
}


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("asked", EDITS.values(), ids=EDITS)
def test_what_was_done_is_a_track_that_gives_the_same_bits(pipeline, policy, asked):
    video = video_of() if any("strength" in str(one) for one in asked) else None
    report, edited = stream(pipeline, policy, asked=asked, video=video)
    assert report.by_hand and report.blocks_made == 4
    track = report.direction.as_track()
    again, replayed = stream(pipeline, policy, track=place(track.written(), 4), video=video)
    assert torch.equal(edited, replayed) and not again.by_hand
    _, plain = stream(pipeline, policy, video=video)
    first = min(asked)
    pictures = 9 + 12 * (first - 1) if first else 0
    assert torch.equal(edited[:pictures], plain[:pictures]) and not torch.equal(edited[pictures:], plain[pictures:])


def test_an_edit_holds_until_the_tracks_next_line_and_ends_a_transition(pipeline):
    planned = f"0: {CAT}\n1->4: a bird\n5: a fish"
    asked = {2: [edit(prompt=DOG)]}
    report, edited = stream(pipeline, "recompute", 6, asked, track=place(planned, 6))
    names = [report.direction.name_of(block) for block in range(6)]
    assert names[:2] == [CAT, f"{CAT} -> 0.75 {CAT} + 0.25 a bird"] and names[2:] == [DOG, DOG, DOG, "a fish"]
    _, replayed = stream(pipeline, "recompute", 6, track=place(report.direction.as_track().written(), 6))
    assert torch.equal(edited, replayed)


@pytest.mark.parametrize("policy", POLICIES)
def test_a_pause_changes_nothing_and_cancel_is_seen_in_it(pipeline, policy):
    looks: list[int] = []

    def look_three_times(control):
        def look():
            looks.append(len(looks))
            if len(looks) == 3:
                control.resume()

        return look

    control, keeper = LiveControl(), FrameKeeper(KeepFrames.ALL)
    steering = Steering(control, look_three_times(control), lambda index, _: control.pause() if index == 0 else None)
    settings = StreamSettings(32, 32, blocks=3, steps=1, seed=7, kv_policy=policy)
    report = run_stream(pipeline, settings, Direction.of(CAT), [keeper], Nobody(), steering=steering)
    assert looks == [0, 1, 2] and not report.by_hand
    _, plain = stream(pipeline, policy, 3)
    paused = keeper.frames()
    assert paused is not None and torch.equal(paused, plain)

    def cancel():
        raise CancelledError

    with pytest.raises(CancelledError):
        stream(pipeline, policy, 3, {1: [LiveControl.pause]}, look=cancel)


def test_stop_ends_behind_the_running_block_and_the_stream_can_go_on(pipeline):
    report, made = stream(pipeline, "rolling", endless=True, asked={2: [edit(prompt=DOG)], 3: [LiveControl.stop]})
    assert report.blocks_made == 3 and report.by_hand and report.snapshot is not None
    _, replayed = stream(pipeline, "rolling", 3, track=place(report.direction.as_track().written(), 3))
    assert torch.equal(made, replayed)
    # Before the first block there is nothing to keep: one is made.
    report, _ = stream(pipeline, "rolling", asked={0: [LiveControl.pause, LiveControl.stop]})
    assert report.blocks_made == 1


@pytest.mark.parametrize(
    ("planned", "stopped_before", "applied"),
    [
        (f"0: {CAT}\n1: a dog\n3: a bird\n5 bias 0.5:", 3, f"0: {CAT}\n1: a dog"),
        (f"0: {CAT}\n2->6 bias 0.4: a bird\n7: a dog", 4, f"0: {CAT}\n2->6 bias 0.4: a bird"),
    ],
    ids=["lines behind the end", "within a transition"],
)
def test_the_track_of_a_stopped_stream_is_for_as_many_blocks(pipeline, planned, stopped_before, applied):
    asked = {stopped_before: [LiveControl.stop]}
    report, made = stream(pipeline, "rolling", 8, asked, track=place(planned, 8))
    track = report.direction.as_track().written()
    assert track == applied and report.blocks_made == stopped_before
    _, replayed = stream(pipeline, "rolling", stopped_before, track=place(track, stopped_before))
    assert torch.equal(made, replayed)


def test_an_edit_behind_the_end_of_the_video_is_not_in_the_track(pipeline):
    images = torch.rand((21, 32, 32, 3), generator=torch.Generator().manual_seed(3))
    video = VideoInput(PictureBatch("video", images, FPS), FPS, 0.5, at_end="stop")
    asked = {1: [edit(strength=0.25)], 2: [edit(prompt=DOG)]}
    report, _ = stream(pipeline, "rolling", endless=True, asked=asked, video=video)
    assert report.blocks_made == 2 and report.direction.as_track().written() == f"0: {CAT}\n1 strength 0.25:"


def test_the_settings_say_which_values_blocks_had(pipeline):
    asked = {1: [edit(strength=0.25)], 2: [edit(attention_bias=0.5)]}
    report, _ = stream(pipeline, "rolling", asked=asked, video=video_of())
    told = report.as_dict()
    assert told["strength_by_block"] == {"0": 0.5, "1-3": 0.25}
    assert told["attention_bias_by_block"] == {"0-1": 1.0, "2-3": 0.5}
    assert told["changed_by_hand"] is True


def test_a_stream_keeps_the_last_bias_for_one_that_goes_on(pipeline):
    report, _ = stream(pipeline, "rolling", 2, {1: [edit(attention_bias=0.25)]})
    assert report.snapshot.settings.attention_bias == 0.25


def test_values_can_be_edited_beside_embeddings(pipeline):
    embeds = torch.zeros(1, 8, pipeline.pipe.text_encoder.config.d_model)
    embeds[:, :2] = 0.5
    report, edited = stream(pipeline, "recompute", 3, {1: [edit(attention_bias=0.3)]}, embeds=embeds)
    track = report.direction.as_track()
    assert not track.has_prompts and report.direction.name_of(0) is None
    _, replayed = stream(pipeline, "recompute", 3, embeds=embeds, track=place(track.written(), 3))
    assert torch.equal(edited, replayed)


def test_the_last_of_many_edits_holds_and_refused_ones_change_nothing():
    control = LiveControl()
    threads = [Thread(target=lambda: [edit(prompt=f"{n}")(control) for n in range(250)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    edit(strength=0.5)(control)
    assert control.pending == Edit(prompt="249", strength=0.5)
    # What waited, and turns out to have no effect once the stream is loaded, is dropped.
    control.allow(Allowed(strength="no video is connected."))
    with pytest.raises(ValueError, match="no video is connected"):
        control.edit(Edit(prompt="a", strength=0.1))
    assert control.take_edit() == Edit(prompt="249") and control.pending == Edit()
    control.stop()
    with pytest.raises(ValueError, match="no block would follow"):
        control.edit(Edit(prompt="a"))
