"""Streams whose latents another decoder than the VAE makes pictures of: a tiny one's file, or a pruned VAE's."""

import json
from dataclasses import asdict, replace

import pytest
import torch
from diffusers import AutoencoderKLWan
from layouts import UMT5, VAE
from safetensors.torch import save_file

from streamblocks.checkpoints.checkpoint_error import CheckpointError
from streamblocks.families.model_family import AttentionChoice
from streamblocks.memory.way_back import FREE_WAY_BACK
from streamblocks.stream.estimate import estimate_memory
from streamblocks.stream.going_on import check_recipe
from streamblocks.stream.materialise import materialise
from streamblocks.stream.pipelines import BuiltInPipeline
from streamblocks.stream.recipe import Recipe
from streamblocks.stream.run_point import parse_description
from streamblocks.stream.saved_stream import SavedStream, describe_saved, read_saved
from streamblocks.stream.session import Session
from streamblocks.stream.settings import StreamSettings
from streamblocks.wan.checkpoints.components import decoder_component, vae_component
from streamblocks.wan.steps.host_pictures import to_uint8_pictures
from streamblocks.wan.vae.banded_decoder import DecodeBounds
from streamblocks.wan.vae.stream_decoder import StreamDecoder
from streamblocks.wan.vae.streaming_vae import denormalize_latents
from streamblocks.wan.vae.tiny_decoder import TinyDecoder, TinyDecoderConfig

CPU, BLOCKS = torch.device("cpu"), 3
SMALL = TinyDecoderConfig(widths=(16, 12, 8, 8))
SETTINGS = StreamSettings(width=32, height=32, steps=1, seed=7)


def write_decoder(path, config=SMALL, change=None, metadata=None):
    """With an encoder's tensor beside it, as in the makers' files."""
    torch.manual_seed(0)
    tensors = {**TinyDecoder(config).state_dict(), "encoder.0.weight": torch.zeros(64, 3, 3, 3)}
    # As drawn, its pictures are nearly black.
    tensors["decoder.22.weight"] *= 100
    tensors["decoder.22.bias"] += 0.5
    if change is not None:
        change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata)
    return path


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("decoders")
    names = ("taew2_1.safetensors", "lighttaew2_1.safetensors")
    return {name.partition("w2")[0]: write_decoder(folder / name) for name in names} | {"vae": VAE}


@pytest.fixture
def nothing_estimated(monkeypatch):
    """Finding out what a stream takes takes ten times as long as a block."""
    monkeypatch.setattr("streamblocks.wan.rehearsal.rehearse_streaming_bytes", lambda *_: 0)


def run(recipe, settings=SETTINGS, blocks=BLOCKS, snapshot_at=None, going_on=None):
    """Latents and pictures of each block, the pipeline, and what was kept behind block `snapshot_at`."""
    pipeline, made, kept = materialise(recipe), [], None
    with Session(pipeline, settings, going_on=going_on, keeps_latents=True) as session:
        for index in range(blocks):
            frames = session.run_block("a cat").frames
            made.append((session.state.get("current_denoised_latents")[:, :, -3:].clone(), frames))
            if index == snapshot_at:
                kept = session.snapshot(), session.snapshot(lean=True)
    latents, pictures = zip(*made, strict=True)
    return torch.cat(latents, dim=2), torch.cat(pictures), pipeline, kept


@pytest.mark.parametrize("kind", ["tae", "lighttae", "vae"])
@pytest.mark.usefixtures("nothing_estimated")
@torch.no_grad()
def test_pictures_are_those_of_the_whole_clip(tiny_folder, files, kind):
    latents, pictures, pipeline, _ = run(Recipe(str(tiny_folder), decoder=str(files[kind]), dtype="float32"))
    vae, decoder = pipeline.pipe.vae, pipeline.pipe.decoder
    if kind == "vae":
        assert isinstance(decoder, AutoencoderKLWan) and decoder is not vae
        pixels = decoder.decode(denormalize_latents(vae, latents), return_dict=False)[0]
    else:
        assert isinstance(decoder, TinyDecoder)
        pixels = decoder(latents if kind == "tae" else denormalize_latents(vae, latents)) * 2 - 1
    expected = to_uint8_pictures(pixels.clamp(-1, 1))[0]
    assert pictures.shape == expected.shape == (33, 32, 32, 3)
    assert (pictures.int() - expected.int()).abs().max() <= 1 and len(pictures.unique()) > 20


@pytest.mark.usefixtures("nothing_estimated")
def test_a_stream_goes_on_from_a_snapshot_whole_and_lean(tiny_folder, files):
    recipe = Recipe(str(tiny_folder), decoder=str(files["tae"]), dtype="float32")
    # Behind more latent frames than the decoder looks back.
    _, pictures, pipeline, kept = run(recipe, blocks=5, snapshot_at=3)
    assert 3 * 4 > pipeline.decoder_reach() == SMALL.reach == 8
    whole, lean = kept
    assert any(name.startswith("decoder_cache") for name in whole.tensors)
    assert not any(name.startswith("decoder_cache") for name in lean.tensors)
    for snapshot in kept:
        assert torch.equal(run(recipe, blocks=1, going_on=snapshot)[1], pictures[-12:])
    with pytest.raises(ValueError, match=r"a stream of decoder '.*taew2_1\.safetensors' and the pipeline has none"):
        check_recipe(whole, replace(recipe, decoder=None))


@pytest.mark.usefixtures("nothing_estimated")
def test_saves_of_before_have_the_vaes_own_decoder(tmp_path, tiny_folder):
    _, _, _, (snapshot, _) = run(Recipe(str(tiny_folder), dtype="float32"), blocks=1, snapshot_at=0)
    described = json.loads(describe_saved(SavedStream(snapshot, None)))
    assert described["recipe"].pop("decoder") is None
    text = json.dumps(described)
    assert parse_description(tmp_path / "a", text)
    assert read_saved(tmp_path / "a", text, snapshot.tensors).snapshot.recipe.decoder is None


@torch.no_grad()
def test_a_cache_goes_back_and_lies_in_ram(tiny_folder, files):
    vae = vae_component(tiny_folder, dtype=torch.float32).load(CPU)
    decoder = StreamDecoder(vae, decoder_component(files["tae"], dtype=torch.float32).load(CPU))
    latents = torch.randn((1, 16, 5, 4, 4), generator=torch.Generator().manual_seed(0))
    parts = latents.split(1, dim=2)
    cache, in_ram = decoder.begin(), DecodeBounds(cache_in_ram=True)
    made = [decoder.decode(part, cache) for part in parts[:3]]
    rewind = cache.remember(FREE_WAY_BACK)
    made.append(decoder.decode(parts[3], cache, in_ram))
    assert rewind() and cache.latent_frames == 3
    again = [decoder.decode(part, cache, bounds) for part, bounds in zip(parts[3:], (in_ram, in_ram), strict=True)]
    assert torch.equal(again[0], made[3])
    whole = decoder.begin()
    assert torch.equal(torch.cat([*made[:3], *again], dim=2), torch.cat([decoder.decode(p, whole) for p in parts], 2))


def test_the_estimate_counts_the_decoder(tiny_folder, files):
    settings = replace(SETTINGS, width=64, height=64)

    def estimate(decoder):
        pipeline = materialise(Recipe(str(tiny_folder), decoder=decoder, dtype="float32"))
        assert isinstance(pipeline, BuiltInPipeline)
        return estimate_memory(pipeline.family, pipeline._store.components, settings, AttentionChoice(), CPU), pipeline

    own, pipeline = estimate(None)
    tiny, with_tiny = estimate(str(files["tae"]))
    elements = sum(parameter.numel() for parameter in TinyDecoder(SMALL).parameters())
    assert tiny.vae == own.vae + 4 * elements and tiny.streaming < own.streaming
    bands = [each.family.decode_bands(each._store.components) for each in (pipeline, with_tiny)]
    assert bands == [(1, 2, 4), (1,)]


def narrowed(tensors):
    tensors["decoder.7.conv.weight"] = torch.zeros(40, 16, 1, 1)


def flattened(tensors):
    tensors["decoder.8.weight"] = torch.zeros(12, 16)


def halved(tensors):
    tensors["decoder.4.conv.2.weight"] = torch.zeros(8, 16, 3, 3)


WRONG = {
    "of another model": (
        None,
        None,
        "the decoder in .* takes 48 latent channels, enlarges 16 times and makes 4 pictures",
    ),
    "growth": (SMALL, narrowed, r"that makes \[0, 2, 2\] frames of one"),
    "axes": (
        SMALL,
        flattened,
        r"has decoder\.8\.weight of shape \[12, 16\], where a tiny decoder has a convolution of",
    ),
    "shape": (SMALL, halved, r"wrong shapes, decoder\.4\.conv\.2\.weight"),
    "absent": (SMALL, lambda tensors: tensors.pop("decoder.22.weight"), r"decoder\.22\.weight nowhere, where a tiny"),
    "a bias": (SMALL, lambda tensors: tensors.pop("decoder.22.bias"), r"lacks decoder\.22\.bias"),
    "surplus": (SMALL, lambda tensors: tensors.update({"decoder.24.bias": torch.zeros(3)}), r"decoder\.24\.bias"),
    "too wide": (replace(SMALL, widths=(16, 12, 8, 1025)), None, r"\[16, 12, 8, 1025\] wide"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_with_a_file_is_one_sentence(tmp_path, tiny_folder, name):
    config, change, says = WRONG[name]
    path = write_decoder(
        tmp_path / "taew2_1.safetensors", config or TinyDecoderConfig(48, (8, 8, 8, 8), patch_size=2), change
    )
    with pytest.raises(CheckpointError, match=says) as caught:
        materialise(Recipe(str(tiny_folder), decoder=str(path)))
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("path", "says"),
    [
        (UMT5, "holds no VAE of Wan"),
        (UMT5.parent, "is a folder: give the file of a tiny decoder"),
        (UMT5.with_name("gone.safetensors"), r"decoder '.*gone\.safetensors' is not there"),
    ],
)
def test_what_is_no_decoder_is_refused(tiny_folder, path, says):
    with pytest.raises(CheckpointError, match=says):
        materialise(Recipe(str(tiny_folder), decoder=str(path)))


@pytest.mark.parametrize(
    ("name", "dtype", "metadata", "normalized"),
    [
        ("taew2_1.safetensors", torch.float32, None, True),
        ("taew2_2.pth", torch.float16, None, True),
        ("lighttaew2_1.safetensors", torch.float16, None, False),
        # As ComfyUI takes them: its files of TAEHV are float16.
        ("other.safetensors", torch.float16, None, True),
        ("other.safetensors", torch.bfloat16, None, False),
        ("other.safetensors", torch.bfloat16, {"latents": "normalized"}, True),
        ("taew2_1.safetensors", torch.float16, {"latents": "denormalized"}, False),
    ],
)
def test_which_latents_a_file_reads(tmp_path, name, dtype, metadata, normalized):
    tensors = {key: tensor.to(dtype) for key, tensor in TinyDecoder(SMALL).state_dict().items()}
    path = tmp_path / name
    torch.save(tensors, path) if path.suffix == ".pth" else save_file(tensors, path, metadata)
    component = decoder_component(path, dtype=torch.float32)
    assert component.config == asdict(replace(SMALL, takes_normalized=normalized))
    loaded = component.load(CPU)
    assert all(torch.equal(value, tensors[key].float()) for key, value in loaded.state_dict().items())
