"""The trained mini model that comes with the pack shows what it is asked for."""

from __future__ import annotations

from pathlib import Path
from typing import cast

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
from streamblocks.tools.train_mini.train_tiny_decoder import FILE
from streamblocks.wan.checkpoints.components import decoder_component
from streamblocks.wan.steps.host_pictures import to_uint8_pictures
from streamblocks.wan.vae.tiny_decoder import TinyDecoder

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


def make_blocks(prompts, seed, policy="recompute", decoder=None):
    settings = StreamSettings(width=64, height=64, blocks=len(prompts), seed=seed, kv_policy=policy)
    recipe = Recipe(str(MINI), dtype="float32", decoder=decoder and str(decoder))
    with Session(materialise(recipe), settings) as session:
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


def test_the_tiny_decoder_makes_the_vaes_pictures_of_the_same_latents(turning_stream):
    expected, latents = turning_stream
    decoder = cast(TinyDecoder, decoder_component(MINI / FILE, dtype=torch.float32).load(torch.device("cpu")))
    past = decoder.empty_past()
    with torch.no_grad():
        blocks = [to_uint8_pictures(decoder(block, past).mul(2.0).sub(1.0))[0] for block in latents]
        alone = to_uint8_pictures(decoder(latents[4]).mul(2.0).sub(1.0))[0]
    assert [len(block) for block in blocks] == [len(block) for block in expected]
    assert min(map(psnr, blocks, expected)) > LEAST_PSNR_DB
    assert psnr(blocks[0][:1], expected[0][:1]) > LEAST_PSNR_DB
    # Without the past it is another picture: what the decoder remembers is of use.
    assert psnr(alone[:5], expected[4][-9:-4]) < min(map(psnr, blocks, expected))


def test_a_stream_by_the_tiny_decoder_shows_what_it_is_asked_for():
    prompts = [plain_caption(SCENES[0])] * 2
    blocks = make_blocks(prompts, seed=500, decoder=MINI / FILE)
    assert [len(block) for block in blocks] == [9, 12]
    assert see(torch.cat(blocks)) == Seen("red", "circle", "right")
