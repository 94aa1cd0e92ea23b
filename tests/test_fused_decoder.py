"""The fused decoder against diffusers' own, frame after frame, and its kernel against the formula."""

import pytest
import torch
from diffusers import AutoencoderKLWan

from streamblocks.ops.kernels.kernel import ALL, SWITCH_VARIABLE
from streamblocks.ops.kernels.norm_silu_launch import NORM_SILU
from streamblocks.wan.vae.norm_silu import PendingSum, norm_into_window, norm_sum
from streamblocks.wan.vae.steady_decoder import fuse_decoder
from streamblocks.wan.vae.streaming_vae import DecoderCache, decode_latent_frame

from golden_wan import relative_error
from triton_interpreter import errors_of

FRAMES = 6


def make_vae(**config):
    torch.manual_seed(3)
    vae = AutoencoderKLWan(**{"base_dim": 8, "z_dim": 16, "num_res_blocks": 1} | config).eval().requires_grad_(False)
    for name, parameter in vae.named_parameters():
        if name.endswith("gamma"):
            parameter.data.uniform_(0.5, 1.5)
    return vae


def decode(vae, latents, frames=FRAMES):
    cache = DecoderCache.for_vae(vae)
    return [decode_latent_frame(vae, latents[:, :, index : index + 1], cache) for index in range(frames)], cache


@pytest.fixture
def latents():
    return torch.randn((1, 16, FRAMES, 4, 6), generator=torch.Generator().manual_seed(1))


def count_calls(monkeypatch):
    calls = []

    def counted(*args, **kwargs):
        calls.append(kwargs["fold"])
        return norm_into_window(*args, **kwargs)

    monkeypatch.setattr("streamblocks.wan.vae.steady_decoder.norm_into_window", counted)
    return calls


@pytest.mark.parametrize("folded_channels", [0, 8, 128])
def test_decodes_as_diffusers_does(latents, monkeypatch, folded_channels):
    vae = make_vae()
    expected, expected_cache = decode(vae, latents)
    monkeypatch.setattr("streamblocks.wan.vae.steady_decoder._FOLDED_CHANNELS", folded_channels)
    calls = count_calls(monkeypatch)
    fuse_decoder(vae)
    made, cache = decode(vae, latents)
    for index, (frame, reference) in enumerate(zip(made, expected, strict=True)):
        assert frame.shape == reference.shape
        assert relative_error(frame, reference) < 1e-5, index
    for feature, reference in zip(cache.features, expected_cache.features, strict=True):
        assert relative_error(feature, reference) < 1e-5
    # The first two latent frames are diffusers' own; each of the others passes every norm that SiLU follows.
    norms = sum(name.endswith(("norm1", "norm2", "norm_out")) for name, _ in vae.decoder.named_modules())
    assert len(calls) == (FRAMES - 2) * norms
    assert any(calls) is (folded_channels > 0)


def test_several_frames_at_once_are_the_same(latents):
    vae = make_vae()
    fuse_decoder(vae)
    expected, _ = decode(vae, latents)
    cache = DecoderCache.for_vae(vae)
    for index in range(2):
        decode_latent_frame(vae, latents[:, :, index : index + 1], cache)
    made = decode_latent_frame(vae, latents[:, :, 2:], cache)
    assert relative_error(made, torch.cat(expected[2:], dim=2)) < 1e-5


def test_a_stream_may_change_decoders_on_the_way(latents):
    vae, plain = make_vae(), make_vae()
    fuse_decoder(vae)
    expected, _ = decode(plain, latents)
    cache = DecoderCache.for_vae(vae)
    for index in range(FRAMES):
        made = decode_latent_frame(plain if index == 4 else vae, latents[:, :, index : index + 1], cache)
        assert relative_error(made, expected[index]) < 1e-5


def test_batches_stay_with_diffusers(latents, monkeypatch):
    vae = make_vae()
    calls = count_calls(monkeypatch)
    pair = torch.cat([latents, latents.flip(2)])
    expected, _ = decode(vae, pair)
    fuse_decoder(vae)
    made, _ = decode(vae, pair)
    assert calls == []
    assert all(torch.equal(frame, reference) for frame, reference in zip(made, expected, strict=True))


def test_the_sum_is_added_up_in_place_and_the_rest_left():
    first, bias, residual, past = (
        torch.randn(3, 4, 5, 8),
        torch.randn(8),
        torch.randn(3, 4, 5, 8),
        torch.randn(2, 4, 5, 8),
    )
    value = PendingSum(first, bias, residual)
    expected, kept = first + bias + residual, (past.clone(), residual.clone())
    norm_into_window(value, torch.ones(8), past, fold=True)
    assert value.first is first
    torch.testing.assert_close(first, expected)
    assert value.bias is None and value.residual is None
    assert torch.equal(past, kept[0]) and torch.equal(residual, kept[1])


def test_no_kernel_off_cuda():
    assert NORM_SILU.why_not(torch.device("cpu")) == "needs CUDA, this is cpu"


def test_the_kernel_computes_the_formula_in_tritons_interpreter():
    errors = errors_of("interpret_fused_norm.py")
    assert len(errors) == 54
    assert max(errors.values()) < 1e-5, errors


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: the Triton kernel is not compared")
@pytest.mark.parametrize("channels", [96, 384, 20])
@pytest.mark.parametrize("frames", [1, 4])
@pytest.mark.parametrize("kind", ["window", "folded", "alone"])
@pytest.mark.parametrize("summands", ["none", "bias", "both"])
def test_the_kernel_computes_the_formula_on_cuda(channels, frames, kind, summands, monkeypatch):
    torch.manual_seed(channels + frames)
    shape = (frames, 13, 17, channels)
    draw = lambda *size: torch.randn(*size, device="cuda", dtype=torch.float16)  # noqa: E731
    value = PendingSum(
        draw(*shape), None if summands == "none" else draw(channels), draw(*shape) if summands == "both" else None
    )
    bias, residual = (None if summand is None else summand.float() for summand in (value.bias, value.residual))
    wide = PendingSum(value.first.float(), bias, residual)
    gamma, past = draw(channels), draw(2, *shape[1:])

    def compute(value, gamma, past):
        if kind == "alone":
            return value.first, norm_sum(value, gamma)
        made = norm_into_window(value, gamma, past, fold=kind == "folded")
        return value.first, made.window, made.past

    made = compute(value, gamma, past)
    assert NORM_SILU.why_not(value.first.device) is None
    monkeypatch.setenv(SWITCH_VARIABLE, ALL)
    expected = compute(wide, gamma.float(), past.float())
    for index, (tensor, reference) in enumerate(zip(made, expected, strict=True)):
        assert relative_error(tensor.float(), reference) < 1e-3, index
