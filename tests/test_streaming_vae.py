"""Decoding and encoding a stream block by block, against diffusers doing it all at once, for both VAEs of Wan."""

from types import SimpleNamespace

import pytest
import torch
from diffusers import AutoencoderKLWan

from streamblocks.wan.vae import gpu_layout
from streamblocks.wan.vae.banded_decoder import UNBOUNDED, DecodeBounds
from streamblocks.wan.vae.streaming_vae import (
    DecoderCache,
    EncoderCache,
    decode_latent_frame,
    denormalize_latents,
    encode_pixel_frame,
    encode_pixel_frames,
)

from golden_wan import relative_error

CPU = torch.device("cpu")
PICTURES = 17


@pytest.fixture(scope="module")
def plain_vae():
    torch.manual_seed(0)
    return AutoencoderKLWan(base_dim=8).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def residual_vae():
    torch.manual_seed(0)
    sizes = {"base_dim": 8, "decoder_base_dim": 16, "z_dim": 48, "num_res_blocks": 1, "is_residual": True}
    patches = {"in_channels": 12, "out_channels": 12, "patch_size": 2, "scale_factor_spatial": 16}
    statistics = {"latents_mean": torch.rand(48).tolist(), "latents_std": (0.5 + torch.rand(48)).tolist()}
    return AutoencoderKLWan(**sizes, **patches, **statistics).eval().requires_grad_(False)


@pytest.fixture(params=["plain_vae", "residual_vae"])
def vae(request):
    return request.getfixturevalue(request.param)


def draw(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def draw_pictures(count=PICTURES, seed=2):
    return torch.rand((1, 3, count, 32, 48), generator=torch.Generator().manual_seed(seed)) * 2 - 1


@torch.no_grad()
def encode_at_once(vae, pictures):
    return vae.encode(pictures).latent_dist.mode()


@torch.no_grad()
def test_streaming_decode_equals_decoding_at_once(vae):
    side = 64 // vae.config.scale_factor_spatial
    latents = draw(1, vae.config.z_dim, 7, side, side)
    expected = vae.decode(denormalize_latents(vae, latents), return_dict=False)[0]
    cache = DecoderCache.for_vae(vae)
    parts = []
    for index, latent in enumerate(latents.split(1, dim=2)):
        parts.append(decode_latent_frame(vae, latent, cache))
        # Another stream on the same VAE, in between, must not disturb this one.
        if index == 3:
            vae.decode(torch.zeros_like(latents[:, :, :2]), return_dict=False)
    assert [part.shape[2] for part in parts] == [1, 4, 4, 4, 4, 4, 4]
    assert parts[0].shape[3:] == (64, 64)
    assert relative_error(torch.cat(parts, dim=2), expected) <= 1e-5


def test_a_decoder_that_cannot_be_split_keeps_its_cache_in_ram_all_the_same(residual_vae):
    latents = draw(1, 48, 4, 4, 2)
    streams = []
    for bounds in (UNBOUNDED, DecodeBounds(bands=4, cache_in_ram=True)):
        cache = DecoderCache.for_vae(residual_vae)
        parts = [decode_latent_frame(residual_vae, latent, cache, bounds) for latent in latents.split(1, dim=2)]
        streams.append((torch.cat(parts, dim=2), cache))
    (expected, _), (made, cache) = streams
    assert relative_error(made, expected) <= 1e-5
    # Overwritten in place: a feature's rows lie together.
    for feature in cache.features:
        assert isinstance(feature, torch.Tensor) and feature.permute(3, 0, 2, 4, 1).is_contiguous()


@torch.no_grad()
def test_encoded_frame_is_the_normalised_mode(vae):
    frame = draw_pictures(1)
    latent = encode_pixel_frame(vae, frame)
    torch.testing.assert_close(denormalize_latents(vae, latent), encode_at_once(vae, frame), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "chunks", [[17], [1] * 17, [1, 4, 4, 4, 4], [9, 8], [2, 0, 3, 6, 1, 5], [4, 13]], ids=lambda chunks: str(chunks)
)
def test_streaming_encode_equals_encoding_at_once(vae, chunks):
    pictures = draw_pictures()
    cache = EncoderCache.for_vae(vae)
    parts, seen = [], 0
    for chunk in pictures.split(chunks, dim=2):
        parts.append(encode_pixel_frames(vae, chunk, cache))
        seen += chunk.shape[2]
        # A latent frame is given as soon as its last picture is there; what is left over is held.
        assert cache.latent_frames == sum(part.shape[2] for part in parts) == (seen + 3) // 4
        assert (0 if cache.held is None else cache.held.shape[2]) == (seen - 1) % 4
        # Another video on the same VAE, in between, must not disturb this one.
        encode_at_once(vae, pictures[:, :, :5])
    latents = torch.cat(parts, dim=2)
    assert latents.dtype is torch.float32 and latents.shape[1] == vae.config.z_dim
    assert relative_error(denormalize_latents(vae, latents), encode_at_once(vae, pictures)) <= 1e-5


def test_pictures_of_an_unfinished_latent_frame_are_held_back_and_not_lost(vae):
    pictures = draw_pictures(12)
    cache = EncoderCache.for_vae(vae)
    latents = encode_pixel_frames(vae, pictures[:, :, :11], cache)
    assert latents.shape[2] == 3
    held = cache.held
    assert held is not None and torch.equal(held, pictures[:, :, 9:11])
    # A view would keep all the pictures in memory.
    assert held.untyped_storage().nbytes() == held.numel() * 4
    none = encode_pixel_frames(vae, pictures[:, :, 11:], cache)
    side = 32 // vae.config.scale_factor_spatial
    assert none.shape == (1, vae.config.z_dim, 0, side, side * 3 // 2)
    last = encode_pixel_frames(vae, draw_pictures(1, seed=3), cache)
    whole = torch.cat([pictures, draw_pictures(1, seed=3)], dim=2)
    made = denormalize_latents(vae, torch.cat([latents, last], dim=2))
    assert relative_error(made, encode_at_once(vae, whole)) <= 1e-5 and cache.held is None


@torch.no_grad()
def test_encoding_then_decoding_gives_as_many_pictures(vae):
    cache, decoder = EncoderCache.for_vae(vae), DecoderCache.for_vae(vae)
    latents = encode_pixel_frames(vae, draw_pictures(), cache)
    decoded = [decode_latent_frame(vae, latent, decoder) for latent in latents.split(1, dim=2)]
    assert torch.cat(decoded, dim=2).shape == draw_pictures().shape


def test_on_a_gpu_only_the_first_vae_gets_fused_passes(vae, monkeypatch):
    encoded = []
    monkeypatch.setattr(gpu_layout, "vae_device", lambda vae: torch.device("cuda"))
    monkeypatch.setattr(gpu_layout, "encode_pixel_frame", lambda vae, frame: encoded.append(frame))
    monkeypatch.setattr(gpu_layout, "NORM_SILU", SimpleNamespace(why_not=lambda device: None))
    before = {name: value.clone() for name, value in vae.state_dict().items()}
    try:
        gpu_layout.speed_up_vae(vae)
        fused = "forward" in vars(vae.decoder)
    finally:
        vars(vae.decoder).pop("forward", None)
    assert fused is bool(encoded) is not vae.config.is_residual
    # cuDNN's layout is for both, and changes no value.
    weight = vae.decoder.conv_in.weight
    assert weight.is_contiguous(memory_format=torch.channels_last_3d)
    assert all(torch.equal(value, before[name]) for name, value in vae.state_dict().items())
