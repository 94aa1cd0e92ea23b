"""Prompt tracks: how they are read, and which block shows what."""

import pytest

from streamblocks.families.model_family import LatentGeometry
from streamblocks.stream.block_clock import BlockClock
from streamblocks.stream.block_prompt import BlockPrompt
from streamblocks.stream.prompt_track import MOST_LINES, PromptTrack

GEOMETRY = LatentGeometry(channels=16, spatial_scale=8, temporal_scale=4, patch=(1, 2, 2))
CLOCK = BlockClock.of(GEOMETRY, frames_per_block=3, fps=12.0)


def place(text, blocks=12):
    return PromptTrack.parse(text).place(blocks, CLOCK)


def names(track, blocks):
    return [track.at(block).name for block in range(blocks)]


def test_lines_last_to_their_end_or_to_the_next():
    track = place("# a comment\n\n0-1: a calm sea, 16:9\n 2 : (storm:1.2), lightning \n4-: a | b\n")
    assert names(track, 6) == ["a calm sea, 16:9"] * 2 + ["(storm:1.2), lightning"] * 2 + ["a | b"] * 2
    assert track.texts == ("a calm sea, 16:9", "(storm:1.2), lightning", "a | b")
    assert track.describe() == {"0-1": "a calm sea, 16:9", "2-3": "(storm:1.2), lightning", "4-": "a | b"}
    assert not track.is_mixed and not any(track.at(block).cut for block in range(6))
    assert hash(PromptTrack.parse("0: a")) == hash(PromptTrack.parse("0: a"))


def test_a_transition_takes_equal_steps_and_stays():
    track = place("0: sea\n2->5: storm\n8->9: a :1 || b :3")
    assert names(track, 8)[1:7] == [
        "sea",
        "sea -> 0.75 sea + 0.25 storm",
        "0.75 sea + 0.25 storm -> 0.5 sea + 0.5 storm",
        "0.5 sea + 0.5 storm -> 0.25 sea + 0.75 storm",
        "0.25 sea + 0.75 storm -> storm",
        "storm",
    ]
    assert track.at(8).parts == (("storm", 0.5), ("a", 0.125), ("b", 0.375))
    thirds = track.at(2).shares_by_frame(3)
    assert [dict(shares)["storm"] for shares in thirds] == pytest.approx([1 / 12, 2 / 12, 3 / 12])
    assert track.at(5).shares_by_frame(2)[1] == track.at(6).shares_by_frame(2)[0] == (("storm", 1.0),)
    assert track.describe() == {"0-1": "sea", "2->5": "storm", "8->9": "0.25 a + 0.75 b"}


def test_weights_are_shares_of_their_sum():
    assert place("0: a cat :7 || a dog :3").at(0) == BlockPrompt((("a cat", 0.7), ("a dog", 0.3)))
    assert place("0: a || b :1 || a :2 || c :0").at(0).parts == (("a", 0.75), ("b", 0.25))
    assert place("0: a :0 || b").at(0).name == "b"
    assert PromptTrack.parse("0: a || b", "slerp").place(1, None).at(0).name == "0.5 a + 0.5 b (slerp)"


def test_a_line_says_how_much_of_a_video_is_replaced():
    placed = place("0: a\n2 strength 0.2: b\n4->7 strength 1: c\n9: d\n10 cut strength 0: e")
    assert placed.has_strength and not place("0: a").has_strength
    strengths = [placed.strength_at(block, 0.6) for block in range(12)]
    assert strengths == pytest.approx([0.6, 0.6, 0.2, 0.2, 0.4, 0.6, 0.8, 1.0, 1.0, 0.6, 0.0, 0.0])
    assert placed.at(10).cut and placed.at(10).name == "e"


def test_words_stand_in_any_order():
    placed = place(
        '0: a\n4->6: b\n5 BIAS 0.3 exact strength 0.2 now cut:  "c: || \\n\\u007b"  \n6.6s bias 1 strength 0:'
    )
    assert names(placed, 6)[3:] == ["a", "a -> 0.666667 a + 0.333333 b", "c: || \n{"]
    assert placed.at(5).cut and placed.cuts == (5,)
    # Behind the cut the first block has 9 pictures: blocks 6, 7 begin at 5.5, 6.5 s.
    assert [placed.bias_at(block, 0.8) for block in (4, 5, 6, 7)] == [0.8, 0.3, 0.3, 1.0]
    assert [placed.strength_at(block, 0.8) for block in (4, 5, 6, 7)] == [0.8, 0.2, 0.2, 0.0]
    assert place('0 exact: [["a\\nb", 1], ["c", 3], ["d", 0]]').at(0).parts == (("a\nb", 0.25), ("c", 0.75))
    # What has always been read.
    assert (
        place("0 cutstrength 0.5: a").strength_at(0, 1.0) == place("0cut  strength 0.5 : a").strength_at(0, 1.0) == 0.5
    )
    assert place("0: now: exact").at(0).name == "now: exact"


def test_a_cut_is_at_its_first_block():
    assert [place("0: a\n2 cut: b\n4-5cut: c\n6: d").at(block).cut for block in range(7)] == [
        False,
        False,
        True,
        False,
        True,
        False,
        False,
    ]


@pytest.mark.parametrize(
    ("text", "starts"),
    [
        # Blocks begin at 0, 0.75, 1.75, 2.75 s: 9 pictures, then 12, at 12 a second.
        ("0s: a\n0.37s: b", None),
        ("0s: a\n0.38s: b", [0, 1]),
        ("0s: a\n1.24s: b\n1.26s-2.7s: c\n2.7s: d", [0, 1, 2, 3]),
        ("0s-2.75s: a\n2.75s->4.75s: b", [0, 3]),
        ("0-3.75 s: a\n4: b", [0, 4]),
        # Behind the cut the first block has 9 pictures again: 1.75, 2.5, 3.5 s.
        ("0s: a\n1.75s cut: b\n2.9s: c\n3.1s: d", [0, 2, 3, 4]),
        ("0s: a\n1.75s cut-: b", None),
        ("0s: a\n1.75s-2.5s cut: b\n3: c", [0, 2, 3]),
    ],
)
def test_seconds_are_the_nearest_block(text, starts):
    if starts is None or None in starts:
        with pytest.raises(ValueError, match="line"):
            place(text)
    else:
        assert [one.start for one in place(text).lines] == starts


@pytest.mark.parametrize(
    ("frames", "fps", "pictures"), [(3, 16.0, (9, 12)), (1, 16.0, (1, 4)), (8, 24.0, (29, 32)), (2, 8.0, (5, 8))]
)
def test_the_clock_has_the_pictures_of_the_familys_blocks(frames, fps, pictures):
    clock = BlockClock.of(GEOMETRY, frames, fps)
    assert (clock.first, clock.others) == pictures
    starts = [0, *(pictures[0] + pictures[1] * block for block in range(4))]
    assert [clock.nearest_block(start / fps) for start in starts] == [0, 1, 2, 3, 4]
    lengths = [first_and_more / fps for first_and_more in starts[1:]]
    assert [clock.blocks_for(length) for length in lengths] == [1, 2, 3, 4]
    assert [clock.blocks_for(length + 1 / fps) for length in lengths] == [2, 3, 4, 5]
    assert clock.blocks_for(0.01) == 1
    on = BlockClock.of(GEOMETRY, frames, fps, goes_on=True)
    assert [on.nearest_block(pictures[1] * block / fps) for block in range(4)] == [0, 1, 2, 3]
    # Behind a cut it is as at the start, in a stream that goes on, too.
    for one in (clock, on):
        begins = [0, one.first, one.first + pictures[1], one.first + pictures[0] + pictures[1]]
        assert [one.nearest_block(begin / fps, [2]) for begin in begins] == [0, 1, 2, 3]
        assert [one.blocks_for(begin / fps, [2]) for begin in begins[1:]] == [1, 2, 3]
        assert [one.blocks_for((begin + 1) / fps, [2]) for begin in begins] == [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "the track has no line: write one such as '0: a calm sea'"),
        ("# nothing", "the track has no line"),
        ("0 strength 1.5: a", "line 1 of the track, '0 strength 1.5: a', has the strength 1.5: give 0 (the video"),
        ("0 strength nan: a", "has the strength nan: give 0"),
        ("a calm sea", "line 1 of the track, 'a calm sea', does not say when"),
        ("0: a\nfour: b", "line 2 of the track, 'four: b', does not say when"),
        ("0: a\n-1: b", "does not say when"),
        ("nan: a", "does not say when"),
        ("0: a\n99999999999: b", "does not say when"),
        ("0:", "has no prompt"),
        ("0: a ||", "has no prompt beside '||'"),
        ("0: :0.5 || b", "has no prompt beside '||'"),
        ("0: a :nan || b", "has the weight nan: give a number of 0 or more"),
        ("0: a :inf || b", "has the weight inf"),
        ("0: a :1e999 || b", "has the weight 1e999"),
        ("0: a :-0.5 || b", "has the weight -0.5"),
        ("0: a :0,7 || b", "has the weight 0,7"),
        ("0: a :0 || b :0", "has weights that add up to nothing"),
        ("0-3: a\n2: b", "begins at block 2, and '0-3: a' lasts to block 3"),
        ("0: a\n4->7: b\n6: c", "begins at block 6, and '4->7: b' lasts to block 7"),
        ("0: a\n5: b\n4: c", "begins at block 4, not behind '5: b' at block 5"),
        ("0: a\n0: b", "begins at block 0, not behind '0: a' at block 0"),
        ("3-1: a", "ends before it begins"),
        ("0s: a\n5s-4s: b", "ends before it begins"),
        ("0s: a\n0.1s-0.2s: b", "is shorter than a block, which takes 1 seconds"),
        ("2: a", "is the first and begins at block 2"),
        ("0-1: a\n4: b", "leaves blocks 2 to 3 without a prompt: begin it at block 2"),
        ("0-10: a", "is the last one and leaves block 11 without a prompt"),
        ("0: a\n12: b", "names block 12, and the stream has 12, 0 to 11"),
        ("0-12: a", "names block 12"),
        ("0: a\n12->13: b", "names block 12"),
        ("0 bias 0: a", "line 1 of the track, '0 bias 0: a', has the bias 0: give a weight of past frames above 0"),
        ("0 bias nan: a", "has the bias nan"),
        ("0 bias: a", "does not say when"),
        ("0 cut now cut: a", "says cut twice: say it once"),
        ("0 bias 1 Strength 1 BIAS 0.5: a", "says bias twice"),
        ("0 nowexact: a", "does not say when"),
        ("0 exact: two words", "says exact, and no JSON string is behind its colon: write the prompt in double quotes"),
        ("0 exact:", "says exact, and no JSON string"),
        ('0 exact: ["a"]', "says exact, and no JSON string"),
        ('0 exact: [["a", NaN]]', "says exact, and no JSON string"),
        ('0 exact: [["a", 0]]', "says exact, and no JSON string"),
        ('0 exact: [["a", -1], ["b", true]]', "says exact, and no JSON string"),
        ("0 exact: " + "[" * 90_000, "says exact, and no JSON string"),
        (f'0 exact: [["a", {"1" * 5000}]]', "says exact, and no JSON string"),
        ("0 strength 0.4: a\n2->4 strength 0.4:", "has a transition and no prompt: write one behind the colon"),
        ("0: a\n2 cut bias 1:", "has a cut and no prompt"),
        ("0: a\n2-4 bias 1:", "has an end and no prompt"),
        ("0: a\n2 now:", "has no prompt"),
        ("0: a\n5 bias 1:\n4: b", "begins at block 4, before '5 bias 1:' at block 5: write lines in the order of time"),
        ("0: a\n5: b\n4 bias 1:", "begins at block 4, before '5: b' at block 5"),
        ("0: a\n12 bias 1:", "names block 12, and the stream has 12"),
        ("0: a\n5: b\n5 now: c", "begins at block 5, not behind '5: b' at block 5"),
        ("0-1: a\n4 now: b", "leaves blocks 2 to 3 without a prompt"),
        ("1 bias 1:\n1: a", "is the first and begins at block 1"),
        ("0->3: a", "is a transition from nothing"),
        ("0: a\n4->4: b", "is a transition within one block"),
        ("0: a\n4->3: b", "ends before it begins"),
        ("0: a\n4->: b", "does not say where its transition ends"),
        ("0: a\n4->6 cut: b", "is a transition and a cut"),
        ("0s-3: a", "mixes seconds and blocks: write '0s-3s:' or '0-3:'"),
        ("0: a\n2.5: b", "names a part of a block"),
        ("\n".join(f"{line}: a" for line in range(MOST_LINES + 1)), "the track has 10001 lines: write at most 10000"),
    ],
)
def test_bad_tracks_are_one_sentence(text, sentence):
    with pytest.raises(ValueError) as error:
        place(text)
    message = str(error.value)
    assert sentence in message
    assert "\n" not in message and message.endswith(".") and len(message) < 300


def test_ten_thousand_lines_are_read():
    lines = "\n".join(f"{line} cut: {'a' * 200} {line}" for line in range(MOST_LINES))
    track = PromptTrack.parse(lines).place(MOST_LINES, CLOCK)
    assert track.at(MOST_LINES - 1).name.endswith(" 9999")
    assert len(track.texts) == MOST_LINES


def test_then_appends():
    track = PromptTrack().then("a", 2).then("b", 4, transition=2).then("c", 1, cut=True).then("d :1 || e :1")
    placed = track.place(12, None)
    assert names(placed, 8) == [
        "a",
        "a",
        "a -> 0.5 a + 0.5 b",
        "0.5 a + 0.5 b -> b",
        "b",
        "b",
        "c",
        "0.5 d + 0.5 e",
    ]
    assert [block for block in range(12) if placed.at(block).cut] == [6]
    behind_a_track = PromptTrack.parse("0s: a\n2s-2.8s: b").then("c").place(12, CLOCK)
    assert names(behind_a_track, 4) == ["a", "a", "b", "c"]


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: PromptTrack.parse("0: a").then("b"), "begins where '0: a' ends, which has no end"),
        (lambda: PromptTrack().then("a").then("b"), "begins where 'then: a' ends, which has no end"),
        (lambda: PromptTrack().then("a", 4, transition=2), "is a transition from nothing"),
        (lambda: PromptTrack().then("a", 4).then("b", 4, transition=1), "is a transition within one block"),
        (lambda: PromptTrack().then("a", 4).then("b", 2, transition=3), "has a transition of 3 blocks in 2"),
        (lambda: PromptTrack().then("a", 4).then("b", 2, transition=2, cut=True), "is a transition and a cut"),
        (lambda: PromptTrack().then("a", -1), "has -1 blocks"),
        (lambda: PromptTrack().then("  "), "has no prompt"),
        (lambda: PromptTrack().then("a", 4).place(3, None), "names block 3, and the stream has 3"),
        (lambda: PromptTrack().then("a", 4).place(6, None), "leaves blocks 4 to 5 without a prompt"),
        (lambda: PromptTrack().place(6, None), "the track has no line"),
        (lambda: PromptTrack.parse("0: a", "cubic"), "interpolation is 'cubic': choose one of linear, slerp"),
    ],
)
def test_bad_chains_are_one_sentence(make, sentence):
    with pytest.raises(ValueError) as error:
        make()
    assert sentence in str(error.value) and "\n" not in str(error.value)
