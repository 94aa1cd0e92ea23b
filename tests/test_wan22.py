"""Wan 2.2's 5B, the second family: its transformer against diffusers' own, and whole streams of a tiny one."""

import json
import shutil

import pytest
import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from layouts import TRANSFORMER, UMT5, VAE, VAE_22, relative_error
from safetensors.torch import save_file

from streamblocks.checkpoints.checkpoint_files import CheckpointError
from streamblocks.families.kv_policies import KV_POLICIES
from streamblocks.ops.fp8_linear import FP8Linear
from streamblocks.ops.int8 import Int8Linear
from streamblocks.ops.quantization import QuantizationSpec
from streamblocks.stream.known_families import FAMILIES, recognise_family
from streamblocks.stream.materialise import materialise
from streamblocks.stream.recipe import Recipe
from streamblocks.stream.session import Session
from streamblocks.stream.settings import StreamSettings
from streamblocks.wan.checkpoints.original_names import original_name
from streamblocks.wan.family import CAUSAL_WAN_21, CAUSAL_WAN_22_5B
from streamblocks.wan.transformer.attention_passes import CausalPass
from streamblocks.wan.transformer.causal_transformer import (
    allocate_cross_cache,
    allocate_kv_cache,
    fill_cross_cache,
    predict_velocity,
)
from streamblocks.wan.transformer.installed_attention import install_causal_attention
from streamblocks.wan.transformer.joined_projections import fuse_self_attention
from streamblocks.wan.vae.streaming_vae import denormalize_latents

pytestmark = pytest.mark.usefixtures("no_pipeline")

BLOCKS, FRAMES_PER_BLOCK = 3, 2
SETTINGS = {
    policy: StreamSettings(
        width=64,
        height=32,
        steps=2,
        kv_policy=policy,
        context_frames=2,
        sink_frames=sink,
        frames_per_block=FRAMES_PER_BLOCK,
        seed=3,
    )
    for policy, sink in zip(KV_POLICIES, (0, 1), strict=True)
}
# Of Wan-AI/Wan2.2-TI2V-5B-Diffusers: what diffusers' `scripts/convert_wan_to_diffusers.py` writes, and defaults.
PUBLISHED_VAE_KEYS = (
    "_class_name",
    "_diffusers_version",
    "attn_scales",
    "base_dim",
    "decoder_base_dim",
    "dim_mult",
    "dropout",
    "in_channels",
    "is_residual",
    "latents_mean",
    "latents_std",
    "num_res_blocks",
    "out_channels",
    "patch_size",
    "scale_factor_spatial",
    "scale_factor_temporal",
    "temperal_downsample",
    "z_dim",
)


def make_transformer(**sizes):
    """Seeded, with the 48 channels of the 5B and Wan's head size."""
    with torch.random.fork_rng():
        torch.manual_seed(4)
        sizes = {"attention_head_dim": 128, "in_channels": 48, "out_channels": 48, "ffn_dim": 256} | sizes
        model = WanTransformer3DModel(num_layers=2, freq_dim=32, text_dim=64, **sizes)
        # diffusers starts the modulation at values that hide a wrong order.
        for block in model.blocks:
            torch.nn.init.normal_(block.scale_shift_table)
    return model.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def transformer_file(tmp_path_factory):
    """As the 5B's single files are: Wan's names under a prefix, no config."""
    path = tmp_path_factory.mktemp("wan22") / "longlive2.safetensors"
    state = make_transformer(num_attention_heads=1).state_dict()
    save_file({f"model.{original_name(name)}": tensor for name, tensor in state.items()}, path)
    return path


@pytest.fixture(scope="module")
def files(transformer_file):
    return Recipe(model=str(transformer_file), vae=str(VAE_22), text_encoder=str(UMT5), dtype="float32")


def run_stream(recipe, policy=KV_POLICIES[0], blocks=BLOCKS):
    """Pictures and latents of each block."""
    pipeline = materialise(recipe)
    pictures, latents = [], []
    with Session(pipeline, SETTINGS[policy]) as session:
        for _ in range(blocks):
            pictures.append(session.run_block("a red fox").frames)
            latents.append(session._state.get("current_denoised_latents")[:, :, -FRAMES_PER_BLOCK:])
    return pictures, torch.cat(latents, dim=2)


@pytest.mark.parametrize("fused", [False, True])
@torch.no_grad()
def test_uncached_block_equals_diffusers(fused):
    draw = torch.Generator().manual_seed(5)
    block, text = torch.randn((1, 48, 3, 4, 6), generator=draw), torch.randn((1, 16, 64), generator=draw)
    transformer = make_transformer(num_attention_heads=3)
    expected = transformer(block, torch.tensor([937.0]), text, return_dict=False)[0]
    if fused:
        fuse_self_attention(transformer)
    install_causal_attention(transformer)
    cross = allocate_cross_cache(transformer, text_tokens=16)
    fill_cross_cache(transformer, cross, text, "a prompt")
    cache = allocate_kv_cache(transformer, frames=3, latent_height=4, latent_width=6)
    made = predict_velocity(transformer, block, 937.0, CausalPass(cache, cross, frame_offset=0))
    assert expected.shape == (1, 48, 3, 4, 6)
    assert relative_error(made, expected) <= 1e-5


@pytest.mark.parametrize("policy", KV_POLICIES)
def test_a_stream_is_its_latents_decoded_at_once(tiny_folder_22, policy):
    recipe = Recipe(model=str(tiny_folder_22), dtype="float32")
    assert materialise(recipe).describe()["family"] == CAUSAL_WAN_22_5B.name
    pictures, latents = run_stream(recipe, policy)
    assert [len(block) for block in pictures] == [5, 8, 8]
    assert latents.shape == (1, 48, BLOCKS * FRAMES_PER_BLOCK, 2, 4)
    vae = AutoencoderKLWan.from_pretrained(tiny_folder_22 / "vae")
    with torch.no_grad():
        pixels = vae.decode(denormalize_latents(vae, latents), return_dict=False)[0]
    expected = ((pixels[0].permute(1, 2, 3, 0) + 1) * 127.5).round()
    made = torch.cat(pictures)
    assert made.shape == (21, 32, 64, 3) and made.float().std() > 5
    assert (made - expected).abs().max() <= 1


def test_the_policies_differ_once_the_window_slides(tiny_folder_22):
    recipe = Recipe(model=str(tiny_folder_22), dtype="float32")
    (_, recomputed), (_, rolled) = (run_stream(recipe, policy) for policy in KV_POLICIES)
    assert torch.equal(recomputed[:, :, : 2 * FRAMES_PER_BLOCK], rolled[:, :, : 2 * FRAMES_PER_BLOCK])
    assert relative_error(rolled, recomputed) > 1e-3


@pytest.mark.parametrize("policy", KV_POLICIES)
def test_single_files_make_the_stream_of_the_folder_with_the_same_weights(files, tmp_path, policy):
    pipeline = materialise(files)
    assert pipeline.describe()["family"] == CAUSAL_WAN_22_5B.name
    expected, _ = run_stream(files, policy)
    assert torch.cat(expected).float().std() > 5
    make_transformer(num_attention_heads=1).save_pretrained(tmp_path / "transformer")
    pipeline.pipe.vae.save_pretrained(tmp_path / "vae")
    recipe = Recipe(model=str(tmp_path), text_encoder=str(UMT5), dtype="float32")
    assert torch.equal(torch.cat(run_stream(recipe, policy)[0]), torch.cat(expected))


def test_a_published_config_loads(tiny_folder_22, tmp_path):
    folder = tmp_path / "published"
    shutil.copytree(tiny_folder_22, folder)
    path = folder / "vae" / "config.json"
    config = json.loads(path.read_text())
    few = {key: config[key] for key in PUBLISHED_VAE_KEYS} | {"clip_output": False}
    path.write_text(json.dumps(few))
    expected, _ = run_stream(Recipe(model=str(tiny_folder_22), dtype="float32"))
    assert torch.equal(torch.cat(run_stream(Recipe(model=str(folder), dtype="float32"))[0]), torch.cat(expected))
    # Scale factors follow from the sizes where a config leaves them out.
    few = {key: value for key, value in few.items() if not key.startswith("scale_factor")}
    path.write_text(json.dumps(few))
    pipeline = materialise(Recipe(model=str(folder), dtype="float32", device="cpu"))
    pipeline.bring_components(SETTINGS[KV_POLICIES[0]])
    scales = pipeline.pipe.vae.config
    assert (scales.scale_factor_spatial, scales.scale_factor_temporal) == (16, 4)


@pytest.mark.parametrize(
    ("spec", "kind"),
    [
        (QuantizationSpec("fp8", activations="none"), lambda layer: isinstance(layer, FP8Linear)),
        (QuantizationSpec("int8", activations="none"), lambda layer: isinstance(layer, Int8Linear)),
    ],
    ids=["fp8", "int8"],
)
def test_quantized_weights_make_nearly_the_same_stream(files, transformer_file, spec, kind):
    _, expected = run_stream(files, blocks=1)
    quantized = Recipe(
        model=str(transformer_file), vae=str(VAE_22), text_encoder=str(UMT5), dtype="float32", quantization=spec
    )
    _, made = run_stream(quantized, blocks=1)
    # Queries, keys and values in one layer; two more of cross-attention's, its joined keys and values or both.
    assert sum(kind(layer) for layer in materialise(quantized).pipe.transformer.modules()) >= 2 * 6
    assert 0 < relative_error(made, expected) < 0.1


@pytest.mark.parametrize(
    ("transformer", "vae", "says"),
    [
        ("2.2", VAE, "the vae in .* gives 16 latent channels and the transformer in .* takes 48: choose"),
        ("2.1", VAE_22, "the vae in .* gives 48 latent channels and the transformer in .* takes 16: choose"),
    ],
)
def test_parts_of_two_families_are_refused(transformer_file, transformer, vae, says):
    model = transformer_file if transformer == "2.2" else TRANSFORMER
    with pytest.raises(CheckpointError, match=says) as caught:
        materialise(Recipe(model=str(model), vae=str(vae), text_encoder=str(UMT5)))
    assert "\n" not in str(caught.value)


def test_folders_of_two_families_are_refused(tiny_folder, tiny_folder_22, transformer_file):
    with pytest.raises(CheckpointError, match=r"gives 48 latent channels and the transformer in .* takes 16"):
        materialise(Recipe(model=str(TRANSFORMER), components=str(tiny_folder_22)))
    with pytest.raises(CheckpointError, match=r"gives 16 latent channels and the transformer in .* takes 48"):
        materialise(Recipe(model=str(transformer_file), components=str(tiny_folder)))


def test_each_family_recognises_its_own(tiny_folder, tiny_folder_22, transformer_file, tmp_path):
    for place in (tiny_folder, TRANSFORMER):
        assert recognise_family(place) is CAUSAL_WAN_21
        assert not CAUSAL_WAN_22_5B.recognises(place)
    for place in (tiny_folder_22, transformer_file):
        assert recognise_family(place) is CAUSAL_WAN_22_5B
        assert not CAUSAL_WAN_21.recognises(place)
    # A config that does not say has the default of diffusers' class, Wan 2.1's channels.
    (tmp_path / "transformer").mkdir()
    (tmp_path / "transformer" / "config.json").write_text(json.dumps({"_class_name": "WanTransformer3DModel"}))
    assert CAUSAL_WAN_21.recognises(tmp_path) and not CAUSAL_WAN_22_5B.recognises(tmp_path)
    assert len({family.name for family in FAMILIES}) == len(FAMILIES)


def test_the_makers_sizes_fit_the_geometry():
    """Latents of LongLive 2.0's `configs/inference.yaml`: 44 x 80; 29 and 32 pictures for 8 latent frames."""
    geometry, defaults = CAUSAL_WAN_22_5B.geometry, CAUSAL_WAN_22_5B.presets[0]
    geometry.check_size(defaults.width, defaults.height)
    assert (defaults.height // geometry.spatial_scale, defaults.width // geometry.spatial_scale) == (44, 80)
    # Wan's `frame_seq_length` of the 5B.
    assert geometry.tokens_per_frame(defaults.width, defaults.height) == 880
    assert geometry.pixel_frames(8, from_the_start=True) == 29 and geometry.pixel_frames(8, from_the_start=False) == 32
    with pytest.raises(ValueError, match="height is 720: choose a multiple of 32, such as 704 or 736"):
        geometry.check_size(1280, 720)


def test_a_size_of_the_other_family_is_refused_before_anything_is_loaded(files):
    pipeline = materialise(files)
    with pytest.raises(ValueError, match="height is 48: choose a multiple of 32"):
        pipeline.check_settings(StreamSettings(width=64, height=48))
