"""The benchmark of streams along a track: its cases and its arithmetic."""

import pytest
import torch

from streamblocks.benchmarks import directed_streams
from streamblocks.benchmarks.directed_streams import DirectedOutcome, changed_scenes, seen_of


def test_cases_change_color_and_shape_and_nothing_else():
    pairs = changed_scenes(48)
    assert len({before for before, _ in pairs}) == 48
    for before, after in pairs:
        assert before.color != after.color and before.shape != after.shape
        assert (before.direction, before.background) == (after.direction, after.background)
    assert changed_scenes(12) == pairs[:12]


def outcome(seen, seams):
    pictures = (torch.empty(0),) * len(seen)
    return DirectedOutcome(tuple(seen), ((0.5, 0.5),) * len(seen), tuple(seams), pictures)


def test_figures_are_those_of_the_block_of_the_change(monkeypatch):
    (a, b), (c, d) = ((seen_of(before), seen_of(after)) for before, after in changed_scenes(2))
    made = [outcome([a, a, a, b, b], [0, 0, 1.0, 0]), outcome([c, c, c, c, d], [0, 0, 2.0, 0])]
    jobs = []

    def make(given, workers):
        jobs.extend(given)
        return made

    monkeypatch.setattr(directed_streams, "make_directed", make)
    figures = directed_streams.measure_track("recompute", 2, cut=True)
    assert figures == {"track_accuracy": 0.5, "track_accuracy_one_block_later": 1.0, "seam_ratio_change": 3.0}
    assert all("\n3 cut: a" in job.track and job.blocks == 5 for job in jobs)


def test_a_transitions_seams_are_its_own_and_the_one_behind(monkeypatch):
    a, b = (seen_of(scene) for scene in changed_scenes(1)[0])
    made = [outcome([a] * 6 + [b] * 2, [9, 9, 0.5, 0.5, 0.5, 0.5, 1.0])]
    monkeypatch.setattr(directed_streams, "make_directed", lambda given, workers: made)
    figures = directed_streams.measure_transition("recompute", 1)
    assert figures["seam_ratio_transition"] == pytest.approx(1.2)
    assert figures["seam_ratio_by_seam"] == [1.0, 1.0, 1.0, 1.0, 2.0]
    assert figures["transition_arrived"] == 1.0
