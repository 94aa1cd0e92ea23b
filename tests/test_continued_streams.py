"""`continue_equal` of `benchmarks/quality.py --direct`: true for the session, false for one that forgets its past."""

import continued_streams
from continued_streams import CASES, continue_equal


def test_it_sees_whether_the_past_is_taken_up(tiny_folder, monkeypatch, no_pipeline):
    monkeypatch.setattr(continued_streams, "SIZE", 32)
    monkeypatch.setattr("streamblocks.wan.rehearsal.rehearse_streaming_bytes", lambda *_: 0)
    short = {"blocks": 2, "cut": 1, "cases": {"rolling, FP8": CASES["rolling, FP8"]}}
    assert continue_equal(str(tiny_folder), **short) == {"rolling, FP8": True}
    session = continued_streams.Session
    monkeypatch.setattr(continued_streams, "Session", lambda pipeline, settings, going_on: session(pipeline, settings))
    assert continue_equal(str(tiny_folder), **short) == {"rolling, FP8": False}
