"""What is not a whole causal transformer is refused in one sentence, from headers, before anything is loaded."""

import json
import time

import pytest
import torch
from accelerate import init_empty_weights
from diffusers import WanTransformer3DModel
from safetensors.torch import load_file, save_file

from streamblocks.checkpoints.checkpoint_files import CheckpointError
from streamblocks.checkpoints.safetensors_reading import StoredTensor
from streamblocks.ops.quantization import QuantizationSpec
from streamblocks.stream.materialise import materialise
from streamblocks.stream.recipe import Recipe
from streamblocks.wan.checkpoints.components import transformer_component
from streamblocks.wan.checkpoints.original_names import original_name
from streamblocks.wan.checkpoints.single_file import recognise_single_file

from wan_loading import load_transformer

pytestmark = pytest.mark.usefixtures("no_pipeline")


@pytest.fixture(scope="module")
def weights():
    """A small transformer with Wan's head size, under Wan's names."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = WanTransformer3DModel(
            num_attention_heads=1, attention_head_dim=128, text_dim=48, freq_dim=32, ffn_dim=256, num_layers=3
        )
    return {original_name(name): tensor.detach().bfloat16() for name, tensor in model.state_dict().items()}


def write_hollow(path, **config):
    """A safetensors file of a transformer of this size, as a hole: no byte of its weights lies on the disk."""
    with init_empty_weights():
        model = WanTransformer3DModel(**config)
    entries, offset = {}, 0
    for name, tensor in model.state_dict().items():
        end = offset + 2 * tensor.numel()
        entries[original_name(name)] = {
            "dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [offset, end],
        }  # fmt: skip
        offset = end
    text = json.dumps(entries).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + offset)
    return path


SIZES = {
    "1.3B": {"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30},
    "14B": {"num_attention_heads": 40, "ffn_dim": 13824, "num_layers": 40},
    "5B": {
        "num_attention_heads": 24, "ffn_dim": 14336, "num_layers": 30, "in_channels": 48, "out_channels": 48,
    },
}  # fmt: skip


def refuse(path, message):
    """The stream of `path` must be refused in one sentence, fast, with nothing loaded."""
    begin = time.perf_counter()
    with pytest.MonkeyPatch.context() as patch, pytest.raises(CheckpointError, match=message) as raised:
        patch.setattr(StoredTensor, "chunks", lambda self, device: pytest.fail(f"{self.key} was read"))
        materialise(Recipe(str(path), components=str(path.parent)))
    assert time.perf_counter() - begin < 1.0
    text = str(raised.value)
    assert str(path) in text and "\n" not in text and text.endswith(".")


@pytest.mark.parametrize("size", SIZES)
def test_trailing_layers_must_be_there(tmp_path, size):
    layers = SIZES[size]["num_layers"]
    whole = write_hollow(tmp_path / "whole.safetensors", **SIZES[size])
    assert recognise_single_file(whole).config["num_layers"] == layers
    path = write_hollow(tmp_path / "part.safetensors", **{**SIZES[size], "num_layers": layers - 2})
    refuse(path, f"has {layers - 2} layers of width .* has {layers}: the file is not complete")


def test_an_image_model_of_36_channels(tmp_path):
    sizes = {**SIZES["14B"], "in_channels": 36}
    refuse(write_hollow(tmp_path / "i2v.safetensors", **sizes), "takes 36 latent channels and gives 16")


def _without(*parts):
    return lambda state: [state.pop(name) for name in list(state) if any(part in name for part in parts)]


def _lora(*names):
    def change(state):
        state.clear()
        state.update({name: torch.zeros(4, 128) for name in names})

    return change


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_without("blocks.1."), "lacks the layer 1, blocks.1, and has blocks.2"),
        (_without("blocks.2.ffn", "blocks.2.self_attn"), r"lacks blocks\.2\.attn1"),
        (_without("head.head.bias"), r"lacks proj_out\.bias"),
        (_without("text_embedding.2.weight"), r"lacks condition_embedder\.text_embedder\.linear_2\.weight"),
        (lambda s: s.update({"blocks.1.self_attn.q.weight": torch.zeros(128, 64)}), r"wrong shapes, blocks\.1\.attn1"),
        (lambda s: s.update({"extra.weight": torch.zeros(3)}), r"has unknown extra\.weight"),
        (lambda s: s.update({"blocks.0.ffn.0.weight_scale": torch.ones(1)}), "its weight is bfloat16 instead of 8"),
        (lambda s: s.update({"blocks.0.ffn.0.scale_weight": torch.ones(1)}), "its weight is bfloat16 instead of 8"),
        (lambda s: s.update({"blocks.9.ffn.0.scale_weight": torch.ones(1)}), "its weight is absent instead of 8"),
        (_lora("blocks.0.self_attn.q.lora_A.weight"), r"holds a LoRA \(.*q\.lora_A\.weight\) and no tr"),
        (_lora("base_model.model.blocks.0.ffn.0.lora_B.default.weight"), "holds a LoRA"),
        (_lora("lora_unet_blocks_0_self_attn_q.lora_down.weight"), "holds a LoRA"),
        (_lora("diffusion_model.blocks.0.self_attn.q.lora_up.weight"), "holds a LoRA"),
        (_lora("diffusion_model.blocks.0.norm3.diff", "diffusion_model.patch_embedding.diff_b"), "holds a LoRA"),
        (lambda s: s.update({"blocks.0.self_attn.q.lora_A.weight": torch.ones(1)}), "a LoRA that is not merged"),
        (_lora("decoder.conv1.weight"), "holds no Wan transformer"),
    ],
    ids=[
        "layer", "half a layer", "head", "text", "shape", "unknown", "scale", "old scale", "lonely scale", "peft",
        "peft wrapped", "kohya", "lora up", "diff", "unmerged", "vae",
    ],
)  # fmt: skip
def test_damaged_and_other_files(weights, tmp_path, change, message, suffix):
    state, path = dict(weights), tmp_path / f"model{suffix}"
    change(state)
    save_file(state, path) if suffix == ".safetensors" else torch.save({"generator": state}, path)
    refuse(path, message)


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".sft"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"<!DOCTYPE html>\n<html><head></head></html>" * 9, "is a web page and no checkpoint"),
        (b"\n  <html lang='en'>" * 50, "is a web page and no checkpoint"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "is a Git LFS pointer.*git lfs pull"),
        (b"GGUF\x03\x00\x00\x00" * 9, "is a GGUF file.*quantize it to FP8 or INT8"),
        (b"", "it is empty: download it again"),
        (b"Entry not found", "download it again"),
    ],
    ids=["page", "page with blanks", "lfs", "gguf", "empty", "words"],
)
def test_what_is_no_checkpoint(tmp_path, content, message, suffix):
    path = tmp_path / f"model{suffix}"
    path.write_bytes(content)
    refuse(path, message)


def test_a_shard_alone(weights, tmp_path):
    path = tmp_path / "diffusion_pytorch_model-00001-of-00006.safetensors"
    save_file(weights, path)
    refuse(path, "is one of the 6 shards of a model")
    path = path.rename(tmp_path / "model-00001-of-00001.safetensors")
    assert recognise_single_file(path).config["num_layers"] == 3


def test_an_unknown_suffix(tmp_path):
    (tmp_path / "model.onnx").write_bytes(b"12345678{}")
    with pytest.raises(CheckpointError, match=r"the suffix '.onnx', allowed are .bin, .ckpt, .pkl, .pt, .pth, .safe"):
        recognise_single_file(tmp_path / "model.onnx")


@pytest.mark.parametrize("marked", ["scaled_fp8", "comfy_quant", "not at all"])
def test_scaled_e5m2_loads_with_its_scales(weights, tmp_path, marked):
    written: dict[str, torch.Tensor] = {}
    expected = {}
    for name, tensor in weights.items():
        if name.startswith("blocks") and name.endswith(".weight") and tensor.ndim == 2:
            scale = tensor.abs().max().float() / 57344
            values = (tensor / scale).to(torch.float8_e5m2)
            written |= {name: values, f"{name.removesuffix('weight')}scale_weight": scale}
            expected[name] = (values.float() * scale).bfloat16()
            if marked == "comfy_quant":
                mark = torch.tensor(list(b'{"format": "float8_e5m2"}'), dtype=torch.uint8)
                written[f"{name.removesuffix('weight')}comfy_quant"] = mark
        else:
            written[name] = tensor
    if marked == "scaled_fp8":
        written["scaled_fp8"] = torch.zeros(0, dtype=torch.float8_e5m2)
    path = tmp_path / "e5m2.safetensors"
    save_file(written, path)
    loaded = load_transformer(path, device="cpu", dtype=torch.bfloat16)
    assert torch.equal(loaded.blocks[1].ffn.net[2].weight, expected["blocks.1.ffn.2.weight"])
    parts = [expected[f"blocks.0.self_attn.{part}.weight"] for part in "qkv"]
    assert torch.equal(loaded.blocks[0].attn1.to_qkv.weight, torch.cat(parts))
    # It is not kept, so it can be quantized to what is computed with.
    fp8 = load_transformer(path, device="cpu", dtype=torch.bfloat16, quantization=QuantizationSpec("fp8", "per row"))
    error = fp8.blocks[1].ffn.net[2].dequantized_weight(torch.float32) - expected["blocks.1.ffn.2.weight"].float()
    assert error.norm() < 0.04 * expected["blocks.1.ffn.2.weight"].float().norm()


WANS_CONFIG = {
    "dim": 128, "eps": 1e-06, "ffn_dim": 256, "freq_dim": 32, "in_dim": 16, "model_type": "t2v", "num_heads": 1,
    "num_layers": 3, "out_dim": 16, "text_len": 512, "text_dim": 48,
}  # fmt: skip
DIFFUSERS_CONFIG = {
    "num_attention_heads": 1, "attention_head_dim": 128, "ffn_dim": 256, "freq_dim": 32, "num_layers": 3,
    "text_dim": 48, "local_attn_size": -1, "sink_size": 0, "num_frames_per_block": 3,
}  # fmt: skip


@pytest.mark.parametrize("config", [WANS_CONFIG, DIFFUSERS_CONFIG], ids=["Wan's words", "diffusers' words"])
@pytest.mark.parametrize("class_name", ["CausalWanTransformer3DModel", "CausalWanModel", "WanModel"])
@pytest.mark.parametrize("prefix", ["", "model.", "diffusers"])
def test_folders_of_causal_classes_load(weights, tmp_path, config, class_name, prefix):
    from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers

    folder = tmp_path / "transformer"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"_class_name": class_name, **config}))
    if prefix == "diffusers":
        state = convert_wan_transformer_to_diffusers(dict(weights))
    else:
        state = {prefix + name: tensor for name, tensor in weights.items()}
    save_file(state, folder / "diffusion_pytorch_model.safetensors")
    loaded = load_transformer(tmp_path, device="cpu", dtype=torch.bfloat16)
    assert torch.equal(loaded.blocks[2].ffn.net[2].weight, weights["blocks.2.ffn.2.weight"])
    assert loaded.config["num_attention_heads"] == 1 and loaded.config["qk_norm"] == "rms_norm_across_heads"


def test_a_folder_with_a_layer_too_few_is_refused_at_once(weights, tmp_path):
    folder = tmp_path / "transformer"
    folder.mkdir()
    config = {"_class_name": "WanTransformer3DModel", **DIFFUSERS_CONFIG, "num_layers": 4}
    (folder / "config.json").write_text(json.dumps(config))
    WanTransformer3DModel.from_config({**config, "num_layers": 3}).save_pretrained(tmp_path / "three")
    save_file(load_file(tmp_path / "three" / "diffusion_pytorch_model.safetensors"), folder / "model.safetensors")
    with pytest.raises(CheckpointError, match="num_layers 4 in its config and 3 layers in its weights") as raised:
        transformer_component(tmp_path, dtype=torch.bfloat16)
    assert "\n" not in str(raised.value)
