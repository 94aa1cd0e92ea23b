"""Decoding in bands of rows and with the cache in RAM, against diffusers decoding the whole video at once."""

import pytest
import torch
from test_fused_decoder import count_calls, make_vae

from streamblocks.memory.peak_meter import PeakMeter
from streamblocks.memory.way_back import WayBack
from streamblocks.wan.vae.banded_decoder import DecodeBounds
from streamblocks.wan.vae.decoder_stages import split_into_stages
from streamblocks.wan.vae.steady_decoder import fuse_decoder
from streamblocks.wan.vae.streaming_vae import DecoderCache, decode_latent_frame, denormalize_latents

from golden_wan import relative_error

WHOLE = DecodeBounds()
BOUNDS = [
    DecodeBounds(cache_in_ram=True),
    DecodeBounds(bands=2),
    DecodeBounds(bands=4, cache_in_ram=True),
    # More than there are rows for.
    DecodeBounds(bands=1000),
]
FRAMES = 5


@pytest.fixture(scope="module")
def vae():
    return make_vae()


@pytest.fixture(scope="module")
def latents():
    return torch.randn((1, 16, FRAMES, 12, 3), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def expected(vae, latents):
    with torch.no_grad():
        return vae.decode(denormalize_latents(vae, latents), return_dict=False)[0]


def decode(vae, latents, bounds):
    """One latent frame after another; `bounds` for all of them, or of each."""
    cache = DecoderCache.for_vae(vae)
    each = bounds if isinstance(bounds, list) else [bounds] * latents.shape[2]
    parts = [
        decode_latent_frame(vae, latent, cache, bound)
        for latent, bound in zip(latents.split(1, dim=2), each, strict=True)
    ]
    return torch.cat(parts, dim=2), cache


def test_a_row_depends_on_the_rows_of_its_halo_and_on_no_others(vae):
    """The halo that is read from the modules, by gradients of a row that a stage makes."""
    for stage in split_into_stages(vae.decoder):
        channels = (stage.resnets[0].conv1 if stage.upsampler is None else stage.upsampler.resample[1]).in_channels
        rows = 2 * stage.halo + 5
        value = torch.randn(1, channels, 1, rows, 3, requires_grad=True)
        made = value if stage.upsampler is None else stage.upsampler(value)
        for resnet in stage.resnets:
            made = resnet(made)
        if stage.decoder is not None:
            made = stage.decoder.conv_out(torch.nn.functional.silu(stage.decoder.norm_out(made)))
        middle = rows // 2
        own = made[:, :, :, middle * stage.scale : (middle + 1) * stage.scale]
        seen = torch.autograd.grad(own.sum(), value)[0].abs().sum((0, 1, 2, 4)).nonzero().flatten()
        assert (middle - int(seen.min()), int(seen.max()) - middle) == (stage.halo, stage.halo)
    assert [stage.halo for stage in split_into_stages(vae.decoder)] == [4, 3, 3, 3]


@pytest.mark.parametrize("bounds", BOUNDS, ids=str)
def test_bands_make_the_same_pictures(vae, latents, expected, bounds):
    made, cache = decode(vae, latents, bounds)
    assert made.shape == expected.shape
    assert relative_error(made, expected) <= 1e-5
    known = decode(vae, latents, WHOLE)[1]
    for feature, reference in zip(cache.features, known.features, strict=True):
        assert feature.shape == reference.shape and relative_error(feature, reference) <= 1e-5


def test_the_fused_decoder_works_in_bands_too(vae, latents, monkeypatch):
    """From the third latent frame on, as for whole pictures, in each band."""
    fused = make_vae()
    fuse_decoder(fused)
    try:
        expected, _ = decode(fused, latents, WHOLE)
        calls = count_calls(monkeypatch)
        made, _ = decode(fused, latents, DecodeBounds(bands=4, cache_in_ram=True))
    finally:
        del fused.decoder.forward
    assert relative_error(made, expected) <= 1e-5
    norms = [2 * len(stage.resnets) for stage in split_into_stages(fused.decoder)]
    # The middle block's four are whole; of the stages, those of 1/64, 1/8, 1/2 and all of the largest one's size.
    by_frame = 4 + norms[0] + norms[1] + 2 * norms[2] + 4 * (norms[3] + 1)
    assert len(calls) == (FRAMES - 2) * by_frame


def test_bands_and_ram_take_less_memory_and_a_rehearsal_counts_it(latents):
    """Of the decoder alone, on the meta device as on this one; there RAM is not counted."""

    def peak(device, bounds):
        vae = make_vae().to(device)
        cache = DecoderCache.for_vae(vae)
        with PeakMeter(meta=device == "meta") as meter:
            for latent in latents[:, :, :3].to(device).split(1, dim=2):
                decode_latent_frame(vae, latent, cache, bounds)
        features = [feature for feature in cache.features if isinstance(feature, torch.Tensor)]
        return meter.peak_bytes, sum(feature.nbytes for feature in features)

    whole, cached = peak("meta", WHOLE)
    banded, _ = peak("meta", DecodeBounds(bands=2))
    in_ram, _ = peak("meta", DecodeBounds(bands=2, cache_in_ram=True))
    assert banded < 0.85 * whole and in_ram < banded - 0.9 * cached
    assert peak("cpu", DecodeBounds(bands=2))[0] == pytest.approx(banded, rel=0.02)


@pytest.mark.parametrize(
    ("way", "goes_back"),
    [(WayBack(), True), (WayBack(on_device=False, ram_bytes=10**9), True), (WayBack(on_device=False), False)],
    ids=["by reference", "in RAM", "none"],
)
@pytest.mark.parametrize("bounds", [WHOLE, DecodeBounds(bands=2), DecodeBounds(cache_in_ram=True)], ids=str)
def test_a_decoder_that_failed_on_the_way_goes_back(latents, bounds, way, goes_back):
    """Whether features are replaced or overwritten in place: what comes is that of a decoder that did not fail."""
    vae = make_vae()
    cache = DecoderCache.for_vae(vae)
    # From the second frame on bands overwrite what they have allocated.
    for frame in range(3):
        decode_latent_frame(vae, latents[:, :, frame : frame + 1], cache, bounds)
    expected = decode(vae, latents[:, :, :5], [bounds] * 5)[0][:, :, -8:]
    rewind = cache.remember(way)
    assert rewind()
    decode_latent_frame(vae, latents[:, :, 3:4], cache, bounds)

    def run_out(module, arguments):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    hook = vae.decoder.up_blocks[-1].resnets[0].register_forward_pre_hook(run_out)
    with pytest.raises(torch.OutOfMemoryError):
        decode_latent_frame(vae, latents[:, :, 4:5], cache, bounds)
    hook.remove()
    assert rewind() is goes_back
    if goes_back:
        assert cache.latent_frames == cache.begun == 3
        again = [decode_latent_frame(vae, latents[:, :, frame : frame + 1], cache, bounds) for frame in (3, 4)]
        assert torch.equal(torch.cat(again, dim=2), expected)
        # Given up, it holds nothing.
        del rewind
        assert not any(cache.is_held(feature) for feature in cache.features)


def test_a_stream_may_change_its_bounds_on_the_way(vae, latents, expected):
    """Even after one latent frame, when diffusers' cache has single frames and marks."""
    bounds = [WHOLE, BOUNDS[2], BOUNDS[1], WHOLE, BOUNDS[0]]
    assert relative_error(decode(vae, latents, bounds)[0], expected) <= 1e-5
    assert relative_error(decode(vae, latents, bounds[::-1])[0], expected) <= 1e-5
