"""The trained mini model that comes with the pack shows what it is asked for."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from streamblocks.benchmarks.drawn_truth import Seen, compare, see
from streamblocks.benchmarks.picture_differences import psnr_of
from streamblocks.stream.materialise import materialise
from streamblocks.stream.prompt_track import PromptTrack
from streamblocks.stream.recipe import Recipe
from streamblocks.stream.session import Session
from streamblocks.stream.settings import StreamSettings
from streamblocks.tools.train_mini.scenes import Scene, plain_caption
from streamblocks.tools.train_mini.train_tiny_decoder import FILE, load_tiny_decoder

ROOT = Path(__file__).resolve().parent.parent
MINI = ROOT / "models/mini"
LARGEST = 16_000_000
LARGEST_TINY_DECODER = 400_000
# Of a block by the tiny decoder, against the VAE's.
LEAST_PSNR_DB = 25.0
# One of each colour, shape, direction and background at least.
SCENES = (
    Scene("red", "circle", "right"),
    Scene("blue", "square", "left", "white"),
    Scene("green", "triangle", "up", "grey"),
    Scene("yellow", "circle", "down"),
)
TURN = "0: a red circle moves right\n3: a blue square moves left"


def make_blocks(prompts, seed, policy="recompute"):
    settings = StreamSettings(width=64, height=64, blocks=len(prompts), seed=seed, kv_policy=policy)
    with Session(materialise(Recipe(str(MINI), dtype="float32")), settings) as session:
        return [session.run_block(prompt).frames for prompt in prompts]


def test_all_files_together_are_small_and_none_is_pickled():
    files = [path for path in MINI.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} <= {".safetensors", ".json", ".md", ".png"}
    assert sum(path.stat().st_size for path in files) < LARGEST
    assert len([path for path in files if path.suffix == ".safetensors"]) == 4
    assert (MINI / FILE).stat().st_size < LARGEST_TINY_DECODER


@pytest.mark.parametrize("policy", ["recompute", "rolling"])
def test_a_stream_shows_what_it_is_asked_for(policy):
    hits = []
    for seed, scene in enumerate(SCENES):
        blocks = make_blocks([plain_caption(scene)] * 4, seed=500 + seed, policy=policy)
        hits.append(compare(torch.cat(blocks), scene))
    assert all(hit.all for hit in hits)


def as_frames(pictures):
    """As a session gives them, of a decoder's [1, 3, F, 64, 64] in 0..1."""
    return (pictures[0].clamp(0.0, 1.0) * 255.0).round().to(torch.uint8).movedim(0, -1)


def psnr(frames, other):
    return psnr_of(float((frames.float() - other.float()).square().mean()))


@pytest.fixture(scope="module")
def turning_stream():
    """Seven blocks that turn at the fourth: their pictures, and their latents."""
    track = PromptTrack.parse(TURN).place(7, None)
    settings = StreamSettings(width=64, height=64, blocks=7, seed=7)
    frames, latents = [], []
    with Session(materialise(Recipe(str(MINI), dtype="float32")), settings) as session:
        for block in range(7):
            frames.append(session.run_block(track.at(block)).frames)
            latents.append(session.state.values["latents"].clone())
    return frames, latents


def test_a_track_turns_the_stream_at_its_block(turning_stream):
    blocks, _ = turning_stream
    assert see(torch.cat(blocks[:3])) == Seen("red", "circle", "right")
    assert see(blocks[3]) == see(torch.cat(blocks[4:])) == Seen("blue", "square", "left")


def test_the_tiny_decoder_shows_what_the_vae_shows(turning_stream):
    expected, latents = turning_stream
    decoder = load_tiny_decoder(MINI / FILE)
    past = decoder.empty_past()
    blocks = [as_frames(decoder(block, past)) for block in latents]
    assert [len(block) for block in blocks] == [9, 12, 12, 12, 12, 12, 12]
    assert see(torch.cat(blocks[:3])) == Seen("red", "circle", "right")
    assert see(blocks[3]) == see(torch.cat(blocks[4:])) == Seen("blue", "square", "left")
    errors = [psnr(block, other) for block, other in zip(blocks, expected, strict=True)]
    assert min(errors) > LEAST_PSNR_DB and psnr(blocks[0][:1], expected[0][:1]) > LEAST_PSNR_DB
    # Without what it remembers of the block before, it is another picture.
    assert psnr(as_frames(decoder(latents[4], decoder.empty_past()))[-9:], expected[4][-9:]) < min(errors)
