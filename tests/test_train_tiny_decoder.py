"""The trainer of the mini's tiny decoder: what it learns from, that it learns, and that it resumes."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLWan
from safetensors import safe_open

from streamblocks.tools.train_mini import decoded_pool
from streamblocks.tools.train_mini import train_tiny_decoder as trainer
from streamblocks.tools.train_mini.decoded_pool import DecodedStream, make_decoded_pool
from streamblocks.wan.checkpoints.components import decoder_component
from streamblocks.wan.vae.tiny_decoder import TinyDecoder, TinyDecoderConfig

MINI = Path(__file__).resolve().parent.parent / "models/mini"
STEPS, GREY = 24, 200
NOISE = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Killed(BaseException):
    """Stands for the kill."""


@pytest.fixture
def train(monkeypatch):
    """Train on one stream of noise, whose pictures are one grey, in small windows; returns the file."""
    pool = [DecodedStream(NOISE, torch.full((3, 9, 64, 64), GREY, dtype=torch.uint8))]
    monkeypatch.setattr(trainer, "make_decoded_pool", lambda *_, **__: pool)
    monkeypatch.setattr(trainer, "LESSONS", (trainer.Lesson(1.0, cells=2, frames=3, batch=1),))

    def run(folder):
        trainer.main([str(folder / "state"), str(folder / "mini"), f"--steps={STEPS}", "--save-every=8"])
        return folder / "mini" / trainer.FILE

    return run


@torch.no_grad()
def error_of(decoder):
    return float((decoder(NOISE[None]) - GREY / 255).abs().mean())


def read(file):
    with safe_open(file, "pt") as opened:
        return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118


def test_the_pools_pictures_are_those_of_the_whole_decode(tmp_path, monkeypatch):
    monkeypatch.setattr(decoded_pool, "CLIP_FRAMES", 2)
    (clip,) = make_decoded_pool(MINI, tmp_path, clips=1, streams=0, seed=3)
    (again,) = make_decoded_pool(MINI, tmp_path, clips=1, streams=0, seed=3)
    assert torch.equal(again.latents, clip.latents) and torch.equal(again.pictures, clip.pictures)
    vae = AutoencoderKLWan.from_pretrained(MINI / "vae", torch_dtype=torch.float32)
    mean, std = (torch.tensor(vae.config[name]).view(-1, 1, 1, 1) for name in ("latents_mean", "latents_std"))
    with torch.no_grad():
        decoded = vae.decode((clip.latents * std + mean)[None]).sample[0]
    assert clip.frames == 2 and clip.pictures.shape == decoded.shape == (3, 5, 64, 64)
    assert ((decoded + 1.0) * 127.5 - clip.pictures).abs().max() <= 0.51


def test_a_window_shows_the_pixels_of_its_latents():
    rows, columns = torch.meshgrid(torch.arange(8), torch.arange(8), indexing="ij")
    place = (10 * rows + columns).expand(3, 6, 8, 8)
    pixels = place[:, :1].repeat_interleave(8, 2).repeat_interleave(8, 3).expand(3, 21, 64, 64)
    window = trainer.cut_window(DecodedStream(place, pixels), frames=3, x=5, y=2, cells=2)
    assert window.latents.shape == (3, 3, 2, 2) and window.pictures.shape == (3, 9, 16, 16)
    assert window.latents[0, 0].tolist() == [[25, 26], [35, 36]]
    assert torch.equal(window.pictures[:, :, ::8, ::8], window.latents[:, :1].expand(3, 9, 2, 2))


def test_the_file_is_in_the_makers_layout_and_a_killed_training_ends_with_the_same(train, tmp_path, monkeypatch):
    file = train(tmp_path / "whole")
    whole = read(file)
    config = TinyDecoderConfig(latent_channels=8, widths=trainer.WIDTHS, takes_normalized=True)
    torch.manual_seed(0)
    untrained = TinyDecoder(config)
    assert whole.keys() == untrained.state_dict().keys()
    assert {tensor.dtype for tensor in whole.values()} == {torch.float16}
    assert [step for step, _ in json.loads(file.with_name("losses.json").read_text())] == [20, STEPS]
    component = decoder_component(file, dtype=torch.float32)
    assert component.config == asdict(config)
    assert error_of(component.load(torch.device("cpu"))) < 0.98 * error_of(untrained)
    save = trainer.TrainingState.save

    def save_and_be_killed(self, path):
        save(self, path)
        raise Killed

    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(trainer.TrainingState, "save", save_and_be_killed)
        train(tmp_path / "killed")
    again = read(train(tmp_path / "killed"))
    assert all(torch.equal(whole[name], again[name]) for name in whole)
