"""The tiny pipeline: small, reproducible, complete, and not degenerate."""

import hashlib
from pathlib import Path

import pytest
import torch
from diffusers import WanPipeline

from streamblocks.tools.make_tiny_model import main
from streamblocks.wan.checkpoints.pipeline_folder import PIPELINE_COMPONENTS, check_pipeline_folder
from streamblocks.wan.checkpoints.tokenizer import load_tokenizer
from streamblocks.wan.tiny_model import write_tiny_model

from wan_loading import load_text_encoder, load_transformer, load_vae


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("tiny") / "model")


def _digests(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_same_seed_writes_the_same_bytes(tiny, tmp_path):
    torch.manual_seed(1234)  # neither read nor moved by the writer
    before = torch.get_rng_state()
    again = write_tiny_model(tmp_path / "again")
    assert torch.equal(torch.get_rng_state(), before)
    assert _digests(again) == _digests(tiny)


def test_another_seed_writes_other_weights(tiny, tmp_path):
    main([str(tmp_path / "other"), "--seed", "1"])
    changed = {name for name, digest in _digests(tmp_path / "other").items() if digest != _digests(tiny)[name]}
    assert changed == {name for name in _digests(tiny) if name.endswith(".safetensors")}


def test_it_is_small_and_complete(tiny):
    files = [path for path in tiny.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 4_000_000
    assert {path.suffix for path in files} == {".json", ".safetensors"}
    assert (tiny / "model_index.json").is_file()
    check_pipeline_folder(tiny, PIPELINE_COMPONENTS)


def test_diffusers_loads_and_runs_it(tiny):
    pipeline = WanPipeline.from_pretrained(tiny, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline.vae_scale_factor_spatial == 8
    assert pipeline.vae_scale_factor_temporal == 4
    video = pipeline(
        "a cat",
        height=32,
        width=48,
        num_frames=9,
        num_inference_steps=2,
        guidance_scale=1.0,
        output_type="pt",
    ).frames
    assert video.shape == (1, 9, 3, 32, 48)
    assert video.isfinite().all()


def test_the_tokenizer_is_t5_like(tiny):
    tokenizer = load_tokenizer(tiny)
    batch = tokenizer(["a dög"], padding="max_length", max_length=12, return_tensors="pt")
    ids = batch.input_ids[0].tolist()
    length = int(batch.attention_mask.sum())
    assert ids[length - 1] == tokenizer.eos_token_id
    assert ids[length:] == [tokenizer.pad_token_id] * (12 - length)
    assert tokenizer.unk_token_id not in ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == "a dög"
    assert len(tokenizer) <= 384


@torch.no_grad()
def test_decoded_noise_is_neither_flat_nor_clamped(tiny):
    vae = load_vae(tiny, device="cpu", dtype=torch.float32)
    latents = torch.randn(1, 16, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    video = vae.decode(latents).sample
    assert video.shape == (1, 3, 9, 64, 64)
    assert video.std((3, 4)).min() > 0.08
    assert (video.abs() > 0.99).float().mean() < 0.02
    assert (video[:, :, 1:] - video[:, :, :-1]).abs().mean() > 0.05


@torch.no_grad()
def test_prompt_and_timestep_matter(tiny):
    encoder = load_text_encoder(tiny, device="cpu", dtype=torch.float32)
    transformer = load_transformer(tiny, device="cpu", dtype=torch.float32)
    batch = load_tokenizer(tiny)(["a cat", "a red tram"], padding="max_length", max_length=16, return_tensors="pt")
    text = encoder(**batch).last_hidden_state
    latents = torch.randn(1, 16, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    velocity, other_text, other_time = (
        transformer(latents, torch.tensor([time]), text[row : row + 1]).sample
        for row, time in ((0, 500.0), (1, 500.0), (0, 100.0))
    )
    assert 0.3 < velocity.std() < 3
    assert (velocity - other_text).abs().mean() > 0.05
    assert (velocity - other_time).abs().mean() > 0.05
