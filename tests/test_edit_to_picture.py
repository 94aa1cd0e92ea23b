"""The benchmark of edits on the tiny model: bookkeeping, no timing."""

import pytest
import torch
from edit_to_picture import measure, modes, table
from full_size_models import SIZES
from live_random_pipeline import LiveRandomPipeline
from random_pipeline import PipelineOptions

from streamblocks.stream.settings import StreamSettings


def test_an_edit_is_followed_to_its_picture():
    pipeline = LiveRandomPipeline(SIZES["tiny"], PipelineOptions(torch.device("cpu"), torch.float32, text_encoder=True))
    settings = StreamSettings(width=32, height=32, steps=1, endless=True)
    # All of the passes: so the edit counts in the block in which it comes, or comes while that is decoded.
    *_, again = modes([1.0])
    figures = measure(pipeline, settings, again, edits=1, seed=0)
    (edit,) = figures["edits"]
    assert (edit["waited"], figures["begun_again"]) in {(0, 1), (1, 0)} and figures["steady_blocks"] >= 1
    assert 0 < edit["picture"] <= edit["jpeg"]
    assert figures["picture"]["mean"] == figures["picture"]["max"]
    assert figures["picture"]["max"] == pytest.approx(edit["picture"] * 1000 / figures["block_ms"])
    header, _, row = table([figures]).splitlines()
    assert header.count("|") == row.count("|") and again.name in row
