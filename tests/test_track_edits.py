"""Edits of a track: what blocks show then, and the text that says the same."""

import random

import pytest

from streamblocks.stream.direction import Direction
from streamblocks.stream.exact_prompts import read_exact, write_exact
from streamblocks.stream.prompt_track import PromptTrack

BLOCKS = 14
ODD_PROMPTS = (
    "a calm sea",
    "two\nlines",
    "  spaces around ",
    "a || b",
    "cats :0.7 || dogs :0.3",
    "0-3: not a line",
    'says "hello"',
    "# a hash",
    "snow ☃ 雪 😀",
    "line\u2028separator\x85next\x0bvertical\x1c",
    "back\\slash \\n and \\",
    "{red|blue} circle",
    "https://example.com /* no comment */",
    "",
    "ends in :0.5",
    '"quoted"',
    "\ttab",
    "exact: now",
    "a \\| b \\",
)


def place(text, blocks=BLOCKS):
    return PromptTrack.parse(text).place(blocks, None)


def behaviour(track, blocks=BLOCKS):
    """All that a stream asks of a track, with two values for what it does not say."""
    shown = [track.at(block) for block in range(blocks)] if track.has_prompts else None
    values = [
        (track.strength_at(block, otherwise), track.bias_at(block, otherwise))
        for otherwise in (0.6, 0.35)
        for block in range(blocks)
    ]
    return shown, values, track.cuts, track.texts, track.is_mixed, track.has_strength, track.has_bias


def assert_written(track):
    again = PromptTrack.parse(track.written(), track.interpolation).place(BLOCKS, None)
    assert behaviour(again) == behaviour(track), track.written()
    assert again.written() == track.written()


def names(track, blocks=BLOCKS):
    return [track.at(block).name for block in range(blocks)]


def random_track(rng):
    """Lines of every kind, as a user writes them."""
    lines, start, least = [], 0, 0
    has_prompts = rng.random() < 0.85
    while start < BLOCKS:
        words = [f"strength {rng.choice((0, 0.1, 0.25, 1))}"] * (rng.random() < 0.4)
        words += [f"bias {rng.choice((0.1, 0.3, 1))}"] * (rng.random() < 0.4)
        now = ["now"] * (start < least or rng.random() < 0.2)
        if not has_prompts or (start and rng.random() < 0.25):
            lines.append(f"{start} {' '.join(words or ['bias 0.5'])}:")
        else:
            steps = rng.randint(2, 5)
            prompt = rng.choice(("sea", "a cat :0.7 || a dog :0.3", "x || y || z", "storm", "x :1 || y :2 || sea :4"))
            if start and rng.random() < 0.4 and start + steps <= BLOCKS:
                place, least = f"{start}->{start + steps - 1}", start + steps
            else:
                place, least = str(start), start + 1
                now += ["cut"] * (rng.random() < 0.2)
            lines.append(f"{place} {' '.join([*now, *words])}: {prompt}")
        start += rng.randint(1, 4)
    return PromptTrack.parse("\n".join(lines), rng.choice(("linear", "slerp"))).place(BLOCKS, None)


@pytest.mark.parametrize("seed", range(8))
def test_what_is_written_is_the_same_track(seed):
    rng = random.Random(seed)
    for _ in range(25):
        track = random_track(rng)
        assert_written(track)
        for _ in range(4):
            before = behaviour(track)
            given = {
                "prompt": rng.choice(ODD_PROMPTS) if rng.random() < 0.6 else None,
                "strength": rng.random() if rng.random() < 0.4 else None,
                "attention_bias": 1.0 - rng.random() if rng.random() < 0.4 else None,
            }
            block = rng.randrange(BLOCKS) if track.has_prompts else 0
            edited = track.with_edit(block, **given)
            assert behaviour(track) == before
            assert_written(edited)
            # What is past stays, and what is given counts from its block on.
            shown, values = behaviour(edited)[:2]
            if track.has_prompts:
                assert shown[:block] == before[0][:block]
                assert given["prompt"] is not None or shown == before[0]
            assert values[:block] == before[1][:block]
            if given["prompt"] is not None:
                assert shown[block].parts == ((given["prompt"], 1.0),) and shown[block].coming_from is None
                assert block in edited.cuts or block not in track.cuts
            assert given["strength"] in (None, values[block][0])
            assert given["attention_bias"] in (None, values[block][1])
            track = edited


@pytest.mark.parametrize("prompt", ODD_PROMPTS)
def test_a_prompt_is_taken_as_it_is(prompt):
    track = PromptTrack.one_prompt(prompt).place(BLOCKS, None)
    assert track.at(5).texts == (prompt,)
    assert_written(track)
    text = track.written()
    assert len(text.splitlines()) == 1
    # Of what the page would replace when it queues a prompt, nothing is left.
    assert not any(mark in text for mark in ("{", "}", "//", "/*", "\\|")) and not text.endswith("\\")
    assert read_exact(write_exact(((prompt, 0.25), ("b", 0.75)))) == ((prompt, 0.25), ("b", 0.75))


def test_mixes_of_prompts_with_line_breaks_are_written():
    track = PromptTrack().then("a\nb :1 || c :2 || d :4", 3).then("e\nf", 4, transition=3).then("g")
    assert_written(track.place(BLOCKS, None))


def test_plain_lines_stay_plain():
    text = "0: a calm sea, 16:9\n2->5 strength 0.4: a cat :0.7 || a dog :0.3\n9 cut bias 0.3: b\n11 strength 0.1:"
    assert place(text).written() == text
    assert place("0-3: a\n4-: b").written() == "0: a\n4: b"


def test_an_edit_holds_until_the_next_planned_line():
    track = place("0-3: a\n4-7 strength 0.2: b\n8 cut strength 0.9: c")
    edited = track.with_edit(5, prompt="robot")
    assert names(edited) == ["a"] * 4 + ["b"] + ["robot"] * 3 + ["c"] * 6
    assert edited.written() == "0: a\n4 strength 0.2: b\n5 now: robot\n8 cut strength 0.9: c"
    # A prompt alone leaves the planned values as they are.
    assert [edited.strength_at(block, 0.6) for block in (4, 5, 7, 8)] == [0.2, 0.2, 0.2, 0.9]
    assert edited.with_edit(5, prompt="fog").written() == edited.written().replace("robot", "fog")
    assert edited.next_line(4) == (5, "robot") and edited.next_line(5) == (8, "c") and edited.next_line(8) is None
    assert track.with_edit(8, prompt="d").written() == track.written()[:-1] + "d"


def test_values_of_an_edit_outlive_its_prompt():
    track = place("0: a\n4 strength 0.2 bias 0.5: b\n8: c\n10 strength 0.3: d")
    edited = track.with_edit(6, prompt="e", strength=0.8)
    assert names(edited)[5:9] == ["b", "e", "e", "c"]
    assert [edited.strength_at(block, 0.6) for block in (5, 6, 8, 9, 10)] == [0.2, 0.8, 0.8, 0.8, 0.3]
    assert [edited.bias_at(block, 1.0) for block in (5, 6, 8)] == [0.5, 0.5, 1.0]
    assert edited == track.with_edit(6, strength=0.8).with_edit(6, prompt="e")
    assert edited.written().splitlines()[2:4] == ["6 now: e", "6 strength 0.8:"]
    # At a planned line both edits are in its place, and what it says of the other value stays.
    again = track.with_edit(4, prompt="e", strength=0.8).with_edit(4, strength=0.9)
    assert again.strength_at(4, 0.6) == 0.9 and again.bias_at(4, 1.0) == 0.5


def test_an_edit_ends_a_transition_and_one_at_its_begin_takes_its_place():
    track = place("0: a\n4->7: b\n10->11: c")
    edited = track.with_edit(6, prompt="e")
    assert names(edited)[4:8] == ["a -> 0.75 a + 0.25 b", "0.75 a + 0.25 b -> 0.5 a + 0.5 b", "e", "e"]
    assert names(edited)[10] == "e -> 0.5 e + 0.5 c"
    assert track.with_edit(4, prompt="e").written() == "0: a\n4: e\n10->11: c"


def test_a_transition_that_begins_within_another_comes_from_what_was_reached():
    track = place("0: a\n4->7 strength 1: b\n6->7 now strength 0: c")
    assert names(track)[6] == "0.5 a + 0.5 b -> 0.25 a + 0.25 b + 0.5 c"
    assert [track.strength_at(block, 0.0) for block in range(4, 9)] == [0.25, 0.5, 0.25, 0.0, 0.0]


def test_values_alone_hold_until_another_is_said():
    track = place("0 strength 0.2: a\n3 strength 0.9 bias 0.3:\n5: b\n7 strength 0.5: c\n9: d\n11 bias 1:")
    assert [track.strength_at(block, 0.6) for block in range(10)] == [0.2] * 3 + [0.9] * 4 + [0.5] * 2 + [0.6]
    assert [track.bias_at(block, 0.8) for block in (2, 3, 10, 11)] == [0.8, 0.3, 0.3, 1.0]
    assert track.least_bias == 0.3 and names(track) == names(place("0: a\n5: b\n7: c\n9: d"))
    # A transition under way goes on, and its value does not.
    moved = place("0 bias 0.2: a\n4->7 bias 1: b").with_edit(6, attention_bias=0.9)
    assert names(moved)[6] == "0.5 a + 0.5 b -> 0.25 a + 0.75 b"
    assert [moved.bias_at(block, 0.5) for block in range(3, 8)] == pytest.approx([0.2, 0.4, 0.6, 0.9, 0.9])


@pytest.mark.parametrize(
    ("text", "strength"),
    [("0: a\n2 strength 0.1:\n2 strength 0.9: b", 0.9), ("0: a\n2 strength 0.9: b\n2 strength 0.1:", 0.1)],
)
def test_at_one_block_the_later_line_counts(text, strength):
    assert place(text).strength_at(2, 0.5) == place(text).strength_at(5, 0.5) == strength
    assert_written(place(text))


def test_a_track_of_values_leaves_the_prompt_to_the_sampler():
    track = place("2 bias 0.3:\n4 strength 0.5 bias 0.8:")
    assert not track.has_prompts and not PromptTrack.parse("0 bias 0.3:").has_prompts
    assert [track.bias_at(block, 1.0) for block in range(5)] == [1.0, 1.0, 0.3, 0.3, 0.8]
    assert track.texts == () and track.next_line(0) is None and track.describe() == {}
    with pytest.raises(ValueError, match="has no prompts"):
        track.at(0)
    with pytest.raises(ValueError, match="give block 0 its prompt first"):
        track.with_edit(3, prompt="b")
    given = Direction.of("a cat", track=track)
    assert given.prompt_of(3) == "a cat" and given.prompts_ahead == () and given.describe() == {"prompt": "a cat"}
    assert given.inputs_of(4, 1.0) == {"attention_bias": 0.8} and given.least_bias == 0.3
    assert Direction.of("", track=place("0: a")).inputs_of(0, 0.5) == {}
    assert names(track.with_edit(0, prompt="a\ncat").with_edit(3, prompt="b"))[2:4] == ["a\ncat", "b"]
