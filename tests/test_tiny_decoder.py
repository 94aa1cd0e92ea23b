"""The tiny decoder, against ComfyUI's own class on the same random weights, and decoded in pieces."""

import runpy
import sys
from types import SimpleNamespace

import pytest
import torch

from streamblocks.wan.vae.tiny_decoder import TinyDecoder, TinyDecoderConfig

from comfyui_server import comfyui_path

LATENT_FRAMES = 5
WAN = TinyDecoderConfig()
WAN_22 = TinyDecoderConfig(latent_channels=48, patch_size=2)
SMALL = TinyDecoderConfig(latent_channels=8, widths=(16, 12, 8, 8))


def make_decoder(config, seed=0):
    torch.manual_seed(seed)
    return TinyDecoder(config).eval().requires_grad_(False)


def draw_latents(config, frames=LATENT_FRAMES, batch=1, height=4, width=6):
    shape = (batch, config.latent_channels, frames, height, width)
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def decode_in_pieces(decoder, latents, lengths):
    past = decoder.empty_past()
    return [decoder(piece, past) for piece in latents.split(lengths, dim=2)]


@pytest.fixture(scope="module")
def taehv():
    """ComfyUI's class, from its own file; of the rest of ComfyUI it needs torch's layers and a device."""
    path = comfyui_path() / "comfy" / "taesd" / "taehv.py"
    if not path.is_file():
        pytest.skip(f"real ComfyUI not found at {comfyui_path()}: set COMFYUI_PATH")
    management = SimpleNamespace(intermediate_device=lambda: torch.device("cpu"))
    comfy = SimpleNamespace(ops=SimpleNamespace(disable_weight_init=torch.nn), model_management=management)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "comfy", comfy)
        patch.setitem(sys.modules, "comfy.ops", comfy.ops)
        patch.setitem(sys.modules, "comfy.model_management", management)
        return runpy.run_path(str(path))["TAEHV"]


@pytest.mark.parametrize("config", [WAN, WAN_22], ids=["wan21", "wan22"])
def test_pictures_are_those_of_comfyuis_class(taehv, config):
    torch.manual_seed(0)
    theirs = taehv(latent_channels=config.latent_channels, parallel=True).requires_grad_(False)
    state = {name: value for name, value in theirs.state_dict().items() if name.startswith("decoder.")}
    decoder = make_decoder(config)
    decoder.load_state_dict(state, strict=True)
    latents = draw_latents(config, frames=3)
    expected = theirs.decode(latents)
    made = decoder(latents)
    assert made.shape == expected.shape and expected.std() > 0.01
    assert (made - expected).abs().mean() <= 1e-5


@pytest.mark.parametrize("lengths", [[1, 1, 1, 1, 1], [3, 2], [1, 4], [2, 2, 1]], ids=str)
def test_pieces_are_the_whole(lengths):
    decoder, latents = make_decoder(SMALL), draw_latents(SMALL, batch=2)
    whole = decoder(latents)
    pieces = decode_in_pieces(decoder, latents, lengths)
    assert [piece.shape[2] for piece in pieces] == [4 * length - 3 * (not at) for at, length in enumerate(lengths)]
    assert torch.equal(torch.cat(pieces, dim=2), whole)


def test_a_past_of_the_reach_is_the_whole_past():
    decoder, latents = make_decoder(SMALL), draw_latents(SMALL, frames=SMALL.reach + 3)

    def past_of(frames):
        past = decoder.empty_past()
        decoder(frames, past)
        return past

    whole, reach = past_of(latents), SMALL.reach
    assert all(map(torch.equal, past_of(latents[:, :, -reach:]), whole))
    assert not all(map(torch.equal, past_of(latents[:, :, 1 - reach :]), whole))


def test_gradients_reach_every_parameter_and_the_latents():
    decoder = make_decoder(SMALL).train().requires_grad_(True)
    latents = draw_latents(SMALL, frames=2, batch=2).requires_grad_(True)
    decoder(latents).square().mean().backward()
    assert latents.grad.abs().sum() > 0
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in decoder.parameters())
