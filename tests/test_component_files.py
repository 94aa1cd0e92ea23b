"""VAE and text encoder as single files, against the values of ComfyUI's own classes."""

import ast
import json

import pytest
import torch
from diffusers.modular_pipelines.wan.encoders import get_t5_prompt_embeds
from layouts import UMT5, UMT5_FP8, UMT5_WAN_NAMES, VAE, VAE_22, relative_error, umt5_values, vae_values
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from streamblocks.checkpoints.checkpoint_files import CheckpointError
from streamblocks.ops.fp8_linear import FP8Linear
from streamblocks.wan.checkpoints.tokenizer import SentencePieceTokenizer, find_tokenizer
from streamblocks.wan.vae.gpu_layout import speed_up_vae
from streamblocks.wan.vae.streaming_vae import (
    DecoderCache,
    EncoderCache,
    LatentStatistics,
    decode_latent_frame,
    encode_pixel_frame,
    encode_pixel_frames,
)

from comfyui_server import comfyui_path
from wan_loading import component_of, load_text_encoder, load_vae

CPU, FP32 = torch.device("cpu"), torch.float32


def embed(encoder, prompt):
    return get_t5_prompt_embeds(encoder, find_tokenizer([UMT5]), prompt, 512, CPU)[0]


def changed(path, target, change):
    """A copy of a file whose tensors `change` has changed, with its metadata."""
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, target, metadata)
    return target


VAES = pytest.mark.parametrize("path", [VAE, VAE_22], ids=["2.1", "2.2"])


@VAES
def test_streamed_decoding_is_comfyuis(path):
    vae, values = load_vae(path, device=CPU, dtype=FP32), vae_values(path)
    speed_up_vae(vae)
    statistics = LatentStatistics.of(vae)
    # The values have no mean and standard deviation applied, which the stream's latents have.
    latents = (values["latents"] - statistics.mean) / statistics.std
    cache = DecoderCache.for_vae(vae)
    pixels = torch.cat([decode_latent_frame(vae, latent, cache) for latent in latents.split(1, dim=2)], dim=2)
    assert relative_error(pixels, values["decoded"].clamp(-1, 1)) <= 1e-5


@VAES
def test_encoding_is_comfyuis(path):
    vae, values = load_vae(path, device=CPU, dtype=FP32), vae_values(path)
    with torch.no_grad():
        mean = vae.encode(values["pixels"]).latent_dist.mode()
    assert relative_error(mean, values["encoded_mean"]) <= 1e-5
    statistics = LatentStatistics.of(vae)
    first = encode_pixel_frame(vae, values["pixels"][:, :, :1]) * statistics.std + statistics.mean
    assert relative_error(first, values["encoded_mean"][:, :, :1]) <= 1e-5
    cache = EncoderCache.for_vae(vae)
    streamed = torch.cat([encode_pixel_frames(vae, part, cache) for part in values["pixels"].split(2, dim=2)], dim=2)
    assert relative_error(streamed * statistics.std + statistics.mean, values["encoded_mean"]) <= 1e-5


@pytest.mark.parametrize(("path", "name"), [(VAE, "Wan21"), (VAE_22, "Wan22")])
def test_mean_and_deviation_of_latents_are_comfyuis(path, name):
    """Read from the source: the module itself needs a running ComfyUI."""
    source = comfyui_path() / "comfy" / "latent_formats.py"
    if not source.is_file():
        pytest.skip(f"real ComfyUI not found at {comfyui_path()}: set COMFYUI_PATH")
    classes = {node.name: node for node in ast.parse(source.read_text()).body if isinstance(node, ast.ClassDef)}
    statistics = LatentStatistics.of(load_vae(path, device=CPU, dtype=FP32))
    expected: dict[str, list[float]] = {}
    for node in ast.walk(classes[name]):
        match node:
            case ast.Assign([ast.Attribute(attr=attribute)], ast.Call(ast.Attribute(ast.Call(args=[values])))):
                expected[attribute] = ast.literal_eval(values)
    assert statistics.mean.flatten().tolist() == pytest.approx(expected["latents_mean"])
    assert statistics.std.flatten().tolist() == pytest.approx(expected["latents_std"])


@VAES
def test_a_vae_file_with_diffusers_names_is_the_same(tmp_path, path):
    vae = load_vae(path, device=CPU, dtype=FP32)
    save_file(vae.state_dict(), tmp_path / "vae.safetensors")
    again = load_vae(tmp_path / "vae.safetensors", device=CPU, dtype=FP32)
    assert dict(again.config) == dict(vae.config)
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in vae.state_dict().items())


@pytest.mark.parametrize(
    ("path", "values", "limit"), [(UMT5, "", 1e-5), (UMT5_WAN_NAMES, "", 1e-5), (UMT5_FP8, "fp8_", 1e-3)]
)
def test_embeddings_are_comfyuis(path, values, limit):
    encoder = load_text_encoder(path, device=CPU, dtype=FP32)
    prompts, expected = umt5_values()
    for index, prompt in enumerate(prompts):
        words = expected[f"{values}embeds_{index}"]
        embeds = embed(encoder, prompt)
        assert relative_error(embeds[: len(words)], words) <= limit
        assert embeds.shape == (512, 64) and not embeds[len(words) :].any()


def test_scaled_fp8_stays_in_eight_bits_and_computes_in_full_precision():
    encoder = load_text_encoder(UMT5_FP8, device=CPU, dtype=FP32)
    kept = [module for module in encoder.modules() if isinstance(module, FP8Linear)]
    # wo is dequantized: transformers would cast its input to FP8.
    assert len(kept) == 2 * 6
    assert {module.activations for module in kept} == {"none"}
    assert component_of(UMT5_FP8, "text_encoder", FP32).bytes < component_of(UMT5, "text_encoder", FP32).bytes


def test_the_newer_marks_of_scaled_fp8_give_the_same(tmp_path):
    def mark(tensors):
        del tensors["scaled_fp8"]
        for name in [name for name in tensors if name.endswith(".scale_weight")]:
            layer = name.removesuffix(".scale_weight")
            tensors[f"{layer}.weight_scale"] = tensors.pop(name).reshape(())
            text = json.dumps({"format": "float8_e4m3fn"}).encode()
            tensors[f"{layer}.comfy_quant"] = torch.tensor(list(text), dtype=torch.uint8)

    newer = load_text_encoder(changed(UMT5_FP8, tmp_path / "newer.safetensors", mark), device=CPU, dtype=FP32)
    older = load_text_encoder(UMT5_FP8, device=CPU, dtype=FP32)
    prompt = umt5_values()[0][0]
    assert torch.equal(embed(newer, prompt), embed(older, prompt))


def test_a_float16_file_loads(tmp_path):
    def halve(tensors):
        tensors |= {name: tensor.half() for name, tensor in tensors.items() if tensor.is_floating_point()}

    encoder = load_text_encoder(changed(UMT5, tmp_path / "half.safetensors", halve), device=CPU, dtype=FP32)
    prompts, expected = umt5_values()
    words = expected["embeds_0"]
    assert relative_error(embed(encoder, prompts[0])[: len(words)], words) <= 2e-3


@pytest.mark.parametrize("path", [UMT5, UMT5_FP8])
def test_the_tokenizer_inside_gives_comfyuis_ids(path):
    tokenizer = find_tokenizer([UMT5_WAN_NAMES, path])
    assert isinstance(tokenizer, SentencePieceTokenizer)
    prompts, expected = umt5_values()
    for index, prompt in enumerate(prompts):
        assert tokenizer(prompt).input_ids == expected[f"ids_{index}"].tolist()
    batch = tokenizer(prompts, padding="max_length", max_length=8, truncation=True, return_tensors="pt")
    assert torch.equal(batch.input_ids[0], expected["ids_0"])
    assert batch.input_ids[1].tolist() == [*expected["ids_1"].tolist(), 0]
    assert batch.attention_mask.tolist() == [[1] * 8, [1] * 7 + [0]]


def test_a_cut_text_keeps_its_end_token():
    whole = find_tokenizer([UMT5])("a red fox runs").input_ids
    cut = find_tokenizer([UMT5])("a red fox runs", max_length=3, truncation=True).input_ids
    assert cut == [*whole[:2], whole[-1]]


def test_without_a_tokenizer_it_is_said_where_one_may_come_from(tmp_path):
    with pytest.raises(CheckpointError, match=r"no tokenizer in .*wan_umt5_original_names.*choose a text encoder file"):
        find_tokenizer([UMT5_WAN_NAMES])
    broken = changed(UMT5, tmp_path / "broken.safetensors", lambda tensors: tensors["spiece_model"].fill_(7))
    with pytest.raises(CheckpointError, match=r"holds a tokenizer .* that cannot be read"):
        find_tokenizer([broken])


def without(name):
    return lambda tensors: tensors.pop(name)


def narrowed(name):
    def change(tensors):
        tensors[name] = tensors[name][:, :4].contiguous()

    return change


def halved(name):
    def change(tensors):
        tensors[name] = tensors[name][: len(tensors[name]) // 2].contiguous()

    return change


@pytest.mark.parametrize(
    ("component", "path", "change", "says"),
    [
        ("vae", UMT5, None, "holds no VAE of Wan"),
        ("vae", VAE, without("encoder.conv1.weight"), "lacks encoder.conv_in.weight"),
        ("vae", VAE, halved("decoder.upsamples.8.residual.2.weight"), "has wrong shapes, decoder.up_blocks.2.resnets"),
        ("vae", VAE_22, without("encoder.conv1.weight"), "lacks encoder.conv_in.weight"),
        ("vae", VAE_22, without("decoder.upsamples.2.upsamples.0.shortcut.bias"), "lacks decoder.up_blocks.2.resnets"),
        ("vae", VAE_22, halved("encoder.downsamples.1.downsamples.2.time_conv.bias"), "has wrong shapes, encoder.down"),
        ("vae", VAE_22, halved("conv2.weight"), "gives 24 latent channels, and mean and .* known for 16 and 48: give"),
        ("vae", VAE_22, narrowed("encoder.conv1.weight"), "takes pictures of 4 channels and gives 12"),
        ("text_encoder", VAE, None, "holds no umt5 text encoder"),
        ("text_encoder", UMT5, without("encoder.block.1.layer.1.layer_norm.weight"), "lacks encoder.block.1"),
        ("text_encoder", UMT5, halved("encoder.block.1.layer.1.DenseReluDense.wi_0.weight"), "has wrong shapes"),
        (
            "text_encoder",
            UMT5,
            without("encoder.block.1.layer.0.SelfAttention.relative_attention_bias.weight"),
            "is a T5 encoder, whose layers share one position bias",
        ),
        (
            "text_encoder",
            UMT5_FP8,
            without("encoder.block.0.layer.0.SelfAttention.q.scale_weight"),
            "lacks the scale of encoder.block.0.layer.0.SelfAttention.q",
        ),
    ],
)
def test_a_wrong_file_is_one_sentence_from_its_header(tmp_path, component, path, change, says):
    if change is not None:
        path = changed(path, tmp_path / "changed.safetensors", change)
    with pytest.raises(CheckpointError, match=says) as caught:
        component_of(path, component, FP32).check()
    assert "\n" not in str(caught.value) and path.name in str(caught.value)
