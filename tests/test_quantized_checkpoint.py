"""Saved quantized transformers: read here bit by bit, read by the real ComfyUI, and files of others read here."""

import json
import os
import subprocess

import pytest
import torch
from diffusers import WanTransformer3DModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from streamblocks.checkpoints.checkpoint_files import CheckpointError
from streamblocks.ops.calibration import calibrating
from streamblocks.ops.fp8_linear import FP8Linear
from streamblocks.ops.quantization import QuantizationSpec
from streamblocks.wan.checkpoints.original_names import original_name
from streamblocks.wan.checkpoints.quantized_checkpoint import save_quantized_transformer

from comfyui_server import comfyui_found, comfyui_path
from wan_loading import load_transformer, plan_for

BF16 = torch.bfloat16
INT8_ROWS = QuantizationSpec("int8", "per row", "dynamic per row")
INT8_TENSOR = QuantizationSpec("int8", "per tensor", "none")
SCHEMES = [
    QuantizationSpec("fp8", "per tensor", "dynamic per tensor"),
    QuantizationSpec("fp8", "per tensor", "none"),
    QuantizationSpec("fp8", "per tensor", "dynamic per tensor", fast_accumulation=False),
    INT8_ROWS,
    INT8_TENSOR,
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small transformer whose heads have Wan's 128 channels, so that files of others can be recognised."""
    folder = tmp_path_factory.mktemp("wan")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        WanTransformer3DModel(
            num_attention_heads=1, attention_head_dim=128, text_dim=48, freq_dim=32, ffn_dim=256, num_layers=2
        ).save_pretrained(folder / "transformer")
    return folder


def _load(source, quantization=None):
    return load_transformer(source, device="cpu", dtype=BF16, quantization=quantization)


def _velocity(transformer):
    generator = torch.Generator().manual_seed(3)
    latents = torch.randn(1, 16, 3, 4, 6, generator=generator).bfloat16()
    text = torch.randn(1, 7, 48, generator=generator).bfloat16()
    with torch.no_grad():
        return transformer(latents, torch.tensor([700.0]), text).sample


@pytest.mark.parametrize("spec", SCHEMES, ids=str)
@pytest.mark.parametrize("which", ["folder", "tiny_folder"])
def test_save_and_load_give_the_same_outputs_bitwise(request, tmp_path, spec, which):
    source = request.getfixturevalue(which)
    saved = _load(source, spec)
    written = []
    path = save_quantized_transformer(
        saved, tmp_path / "quantized.safetensors", on_tensor=lambda name, nbytes: written.append(nbytes)
    )
    loaded = _load(path)
    assert torch.equal(_velocity(loaded), _velocity(saved))
    plan = plan_for(path, "transformer", torch.bfloat16, None)
    assert plan.spec == spec and plan.bytes_after == plan_for(source, "transformer", torch.bfloat16, spec).bytes_after
    kept = {layer.fast_accumulation for layer in loaded.modules() if isinstance(layer, FP8Linear)}
    assert kept == ({spec.fast_accumulation} if spec.format == "fp8" else set())
    assert path.stat().st_size < sum(written) + 50_000 and list(tmp_path.iterdir()) == [path]
    again = save_quantized_transformer(loaded, tmp_path / "again.safetensors")
    assert again.read_bytes() == path.read_bytes()


def test_static_scales_are_saved_and_read(folder, tmp_path):
    saved = _load(folder, QuantizationSpec("fp8", "per tensor", "static"))
    with calibrating(saved):
        _velocity(saved)
    path = save_quantized_transformer(saved, tmp_path / "static.safetensors")
    loaded = _load(path)
    for name, layer in loaded.named_modules():
        if isinstance(layer, FP8Linear):
            assert layer.activations == "static"
            expected = saved.get_submodule(name).input_scale
            assert layer.input_scale is not None and torch.equal(layer.input_scale, expected)


def test_the_file_is_in_comfyuis_format(folder, tmp_path):
    path = save_quantized_transformer(_load(folder, SCHEMES[0]), tmp_path / "fp8.safetensors")
    state = load_file(path)
    assert state["blocks.1.self_attn.k.weight"].dtype == torch.float8_e4m3fn
    assert state["blocks.1.self_attn.k.weight_scale"].shape == ()
    assert json.loads(state["blocks.1.self_attn.k.comfy_quant"].numpy().tobytes()) == {"format": "float8_e4m3fn"}
    assert state["patch_embedding.weight"].dtype == BF16 and not any("to_qkv" in name for name in state)
    with safe_open(path, "pt") as opened:
        config = json.loads(opened.metadata()["config"])["transformer"]
    assert config["causal_ar"] is True and "num_heads" not in config
    int8 = load_file(save_quantized_transformer(_load(folder, INT8_ROWS), tmp_path / "int8.safetensors"))
    assert int8["blocks.0.ffn.0.weight"].dtype == torch.int8
    assert int8["blocks.0.ffn.0.weight_scale"].shape == (256, 1)
    assert json.loads(int8["blocks.0.ffn.0.comfy_quant"].numpy().tobytes()) == {"format": "int8_tensorwise"}


def test_names_are_the_inverse_of_diffusers_renaming(folder):
    from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers

    names = list(load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors"))
    originals = {original_name(name): name for name in names}
    assert len(originals) == len(names)
    renamed = convert_wan_transformer_to_diffusers({original: original for original in originals})
    assert {name: originals[original] for name, original in renamed.items()} == {name: name for name in names}


def _fail(name, nbytes):
    raise ZeroDivisionError


def test_what_cannot_be_saved_is_refused_and_leaves_nothing(folder, tmp_path):
    path = tmp_path / "model.safetensors"
    with pytest.raises(ValueError, match="no quantized layer"):
        save_quantized_transformer(_load(folder), path)
    with pytest.raises(ValueError, match="choose INT8"):
        save_quantized_transformer(_load(folder, QuantizationSpec("fp8", "per row")), path)
    with pytest.raises(ValueError, match="suffix"):
        save_quantized_transformer(_load(folder, SCHEMES[0]), tmp_path / "model.bin")
    with pytest.raises(ZeroDivisionError):
        save_quantized_transformer(_load(folder, SCHEMES[0]), path, on_tensor=_fail)
    assert not list(tmp_path.iterdir())


def test_quantizing_a_quantized_file_is_refused(folder, tmp_path):
    path = save_quantized_transformer(_load(folder, SCHEMES[0]), tmp_path / "fp8.safetensors")
    for format_ in ("fp8", "int8"):
        with pytest.raises(CheckpointError, match=r"quantized already \(float8_e4m3fn\)"):
            _load(path, QuantizationSpec(format_))


def _others_file(folder, path, scale_name="weight_scale", marked="comfy_quant", prefix="", change=None):
    """A checkpoint as others write it: one FP8 scale per projection, each another."""
    state = load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors")
    written: dict[str, torch.Tensor] = {}
    expected, metadata = {}, {}
    for name, tensor in state.items():
        original = prefix + original_name(name)
        layer = original.removesuffix(".weight")
        if name.endswith(".weight") and tensor.ndim == 2 and ("blocks" in name or "time_proj" in name):
            scale = tensor.abs().max() / 448
            quantized = (tensor / scale).to(torch.float8_e4m3fn)
            written |= {original: quantized, f"{layer}.{scale_name}": scale}
            if marked == "comfy_quant":
                mark = list(json.dumps({"format": "float8_e4m3fn"}).encode())
                written[f"{layer}.comfy_quant"] = torch.tensor(mark, dtype=torch.uint8)
            expected[name] = quantized.float() * scale
            metadata[layer] = {"format": "float8_e4m3fn"}
        else:
            written[original] = expected[name] = tensor.bfloat16()
    if marked == "scaled_fp8":
        written[f"{prefix}scaled_fp8"] = torch.zeros(2, dtype=torch.float8_e4m3fn)
    if change is not None:
        change(written)
    header = {"_quantization_metadata": json.dumps({"format_version": "1.0", "layers": metadata})}
    save_file(written, path, header if marked == "header" else None)
    return expected


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
@pytest.mark.parametrize("scale_name", ["weight_scale", "scale_weight"])
@pytest.mark.parametrize("marked", ["comfy_quant", "header", "scaled_fp8", "not at all"])
def test_fp8_files_of_others_load(folder, tmp_path, scale_name, marked, prefix):
    path = tmp_path / "others.safetensors"
    expected = _others_file(folder, path, scale_name, marked, prefix)
    loaded = _load(path)
    qkv = loaded.blocks[0].attn1.to_qkv
    assert isinstance(qkv, FP8Linear) and qkv.weight_scale.shape == (1, 384)
    parts = [expected[f"blocks.0.attn1.{part}.weight"] for part in ("to_q", "to_k", "to_v")]
    assert torch.equal(qkv.dequantized_weight(torch.float32), torch.cat(parts))
    assert loaded.blocks[1].ffn.net[2].weight_scale.shape == (1, 1)
    assert qkv.activations == ("none" if marked == "scaled_fp8" else "dynamic per tensor")
    # What we never keep quantized is dequantized.
    time_proj = loaded.condition_embedder.time_proj
    assert torch.equal(time_proj.weight, expected["condition_embedder.time_proj.weight"].to(time_proj.weight.dtype))
    path = save_quantized_transformer(loaded, tmp_path / "ours.safetensors")
    assert torch.equal(_velocity(_load(path)), _velocity(loaded))


def _without(suffix):
    return lambda state: [state.pop(name) for name in list(state) if name.endswith(suffix)]


@pytest.mark.parametrize(
    ("marked", "change", "message"),
    [
        ("comfy_quant", _without("blocks.0.ffn.0.weight_scale"), r"lacks the scale of blocks\.0\.ffn\.0"),
        ("header", _without("weight_scale"), "lacks the scale of"),
        ("scaled_fp8", _without("weight_scale"), "lacks the scale of"),
        ("not at all", _without("blocks.1.self_attn.o.weight_scale"), "lacks the scale of blocks.1.self_attn.o"),
        (
            "comfy_quant",
            lambda s: s.update({"blocks.0.ffn.0.weight_scale": torch.tensor(float("nan"))}),
            "not finite or negative",
        ),
        ("comfy_quant", lambda s: s.update({"blocks.0.ffn.0.weight_scale": torch.ones(7)}), r"scale of shape \[7\]"),
        (
            "comfy_quant",
            lambda s: s.update(
                {"blocks.0.ffn.0.comfy_quant": torch.tensor(list(b'{"format": "nvfp4"}'), dtype=torch.uint8)}
            ),
            "as nvfp4, allowed are float8_e4m3fn, int8_tensorwise",
        ),
        (
            "comfy_quant",
            lambda s: s.update({"blocks.0.ffn.0.weight": torch.zeros(256, 128, dtype=torch.int8)}),
            "as float8_e4m3fn but stores torch.int8",
        ),
    ],
    ids=["one scale", "no scales", "no old scales", "unmarked", "nan scale", "wrong scale", "other format", "dtype"],
)
def test_damaged_files_are_named(folder, tmp_path, marked, change, message):
    _others_file(folder, tmp_path / "others.safetensors", marked=marked, change=change)
    with pytest.raises(CheckpointError, match=message):
        _load(tmp_path / "others.safetensors")


# Runs in ComfyUI's own environment: what its "Load Diffusion Model" node calls, then the weights as it computes.
READ_IN_COMFYUI = """
import os, sys
path, result = sys.argv[1:]
sys.argv = ["main.py", "--cpu"]
sys.path.insert(0, os.environ["COMFYUI_PATH"])
import comfy.options
comfy.options.enable_args_parsing()
import comfy.sd, torch
from safetensors.torch import save_file
patcher = comfy.sd.load_diffusion_model(path)
weights = {}
for name, module in patcher.model.diffusion_model.named_modules():
    weight = getattr(module, "weight", None)
    if getattr(module, "quant_format", None) is not None:
        weights[name] = weight.data.dequantize().float().contiguous()
import comfy.sample
from comfy_extras.nodes_ar_video import SamplerARVideo
causal = type(patcher.model).__name__ == "WAN21_CausalAR"
sampler = SamplerARVideo.execute(num_frame_per_block=3).result[0] if causal else comfy.samplers.sampler_object("euler")
generator = torch.Generator().manual_seed(0)
text = torch.randn(1, 8, patcher.model.diffusion_model.text_embedding[0].in_features, generator=generator)
channels = patcher.model.diffusion_model.patch_embedding.in_channels
noise = torch.randn(1, channels, 6, 4, 6, generator=generator)
conditioning, sigmas = [[text, {}]], torch.tensor([1.0, 0.9, 0.6, 0.0])
with torch.no_grad():
    weights["sampled"] = comfy.sample.sample_custom(
        patcher, noise, 1.0, sampler, sigmas, conditioning, conditioning, torch.zeros_like(noise),
        disable_pbar=True, seed=1,
    ).float().contiguous()
save_file(weights, result, {"model": type(patcher.model).__name__})
"""


@pytest.mark.skipif(not comfyui_found(), reason=f"real ComfyUI not found at {comfyui_path()}: set COMFYUI_PATH")
@pytest.mark.parametrize(
    ("tiny", "spec", "model"),
    [
        ("tiny_folder", SCHEMES[0], "WAN21_CausalAR"),
        ("tiny_folder", INT8_ROWS, "WAN21_CausalAR"),
        ("tiny_folder", INT8_TENSOR, "WAN21_CausalAR"),
        ("tiny_folder_22", SCHEMES[0], "WAN22"),
    ],
    ids=["fp8", "int8 per row", "int8 per tensor", "fp8 of 2.2"],
)
def test_the_real_comfyui_reads_and_samples_our_files(request, tmp_path, tiny, spec, model):
    saved = _load(request.getfixturevalue(tiny), spec)
    path = save_quantized_transformer(saved, tmp_path / "ours.safetensors")
    result = tmp_path / "weights.safetensors"
    root = comfyui_path()
    python = root / ".venv" / "bin" / "python"
    environment = {**os.environ, "COMFYUI_PATH": str(root)}
    run = subprocess.run(
        [python, "-c", READ_IN_COMFYUI, path, result], env=environment, capture_output=True, text=True, timeout=120
    )
    assert run.returncode == 0, run.stderr[-2000:]
    with safe_open(result, "pt") as opened:
        assert opened.metadata()["model"] == model
    theirs = load_file(result)
    sampled = theirs.pop("sampled")
    assert sampled.shape == (1, saved.config.in_channels, 6, 4, 6)
    assert torch.isfinite(sampled).all() and sampled.std() > 0.1
    plan = plan_for(path, "transformer", torch.bfloat16, None)
    assert len(theirs) == len(plan.quantized_names) + 2 * 2  # q, k and v instead of qkv, in two layers
    for name in plan.quantized_names:
        layer = saved.get_submodule(name)
        ours = layer.dequantized_weight(torch.float32)
        parts = ["to_q", "to_k", "to_v"] if name.endswith("to_qkv") else [""]
        names = [original_name(name.removesuffix("to_qkv") + part) for part in parts]
        torch.testing.assert_close(torch.cat([theirs[name] for name in names]), ours, rtol=1e-6, atol=0)
