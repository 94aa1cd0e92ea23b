"""The trained mini model that comes with the pack shows what it is asked for."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from streamblocks.benchmarks.drawn_truth import Seen, compare, see
from streamblocks.stream.materialise import materialise
from streamblocks.stream.prompt_track import PromptTrack
from streamblocks.stream.recipe import Recipe
from streamblocks.stream.session import Session
from streamblocks.stream.settings import StreamSettings
from streamblocks.tools.train_mini.scenes import Scene, plain_caption

ROOT = Path(__file__).resolve().parent.parent
MINI = ROOT / "models/mini"
LARGEST = 16_000_000
# One of each colour, shape, direction and background at least.
SCENES = (
    Scene("red", "circle", "right"),
    Scene("blue", "square", "left", "white"),
    Scene("green", "triangle", "up", "grey"),
    Scene("yellow", "circle", "down"),
)


def make_blocks(prompts, seed, policy="recompute"):
    settings = StreamSettings(width=64, height=64, blocks=len(prompts), seed=seed, kv_policy=policy)
    with Session(materialise(Recipe(str(MINI), dtype="float32")), settings) as session:
        return [session.run_block(prompt).frames for prompt in prompts]


def test_all_files_together_are_small_and_none_is_pickled():
    files = [path for path in MINI.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} <= {".safetensors", ".json", ".md", ".png"}
    assert sum(path.stat().st_size for path in files) < LARGEST
    assert len([path for path in files if path.suffix == ".safetensors"]) == 3


@pytest.mark.parametrize("policy", ["recompute", "rolling"])
def test_a_stream_shows_what_it_is_asked_for(policy):
    hits = []
    for seed, scene in enumerate(SCENES):
        blocks = make_blocks([plain_caption(scene)] * 4, seed=500 + seed, policy=policy)
        hits.append(compare(torch.cat(blocks), scene))
    assert all(hit.all for hit in hits)


def test_a_track_turns_the_stream_at_its_block():
    track = PromptTrack.parse("0: a red circle moves right\n3: a blue square moves left").place(7, None)
    blocks = make_blocks([track.at(block) for block in range(7)], seed=7)
    assert see(torch.cat(blocks[:3])) == Seen("red", "circle", "right")
    assert see(blocks[3]) == see(torch.cat(blocks[4:])) == Seen("blue", "square", "left")
