"""LoRAs merged while a model is read: values of ComfyUI's own merging, quantizing behind it, memory, refusals."""

import gc
import json
import math
from pathlib import Path

import pytest
import torch
from diffusers import WanTransformer3DModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from streamblocks.checkpoints.checkpoint_files import CheckpointError
from streamblocks.checkpoints.lora_choice import LoraChoice
from streamblocks.memory.peak_meter import PeakMeter
from streamblocks.ops.fp8_linear import FP8Linear
from streamblocks.ops.int8 import Int8Linear
from streamblocks.ops.quantization import WEIGHT_GRANULARITIES, QuantizationSpec
from streamblocks.wan.checkpoints.components import transformer_component
from streamblocks.wan.checkpoints.original_names import original_name
from streamblocks.wan.checkpoints.quantized_checkpoint import save_quantized_transformer
from streamblocks.wan.transformer.joined_projections import fused_rows

from golden_wan import relative_error
from wan_loading import load_transformer

LAYOUTS = Path(__file__).parent / "data" / "layouts"
MODEL = LAYOUTS / "causal_wan.safetensors"
NAMINGS = ("peft", "kohya", "down_up_diff", "dora")
BF16, F32 = torch.bfloat16, torch.float32


def lora_file(naming):
    return LAYOUTS / f"lora_{naming}.safetensors"


def choices(*loras):
    return tuple(LoraChoice(str(path), strength) for path, strength in loras)


def load(*loras, dtype=F32, quantization=None, model=MODEL):
    return load_transformer(model, device="cpu", dtype=dtype, quantization=quantization, loras=choices(*loras))


def parameters_of(transformer):
    """Under Wan's names, projections apart."""
    parameters = dict(transformer.named_parameters())
    rows = fused_rows(transformer)
    whole = {parent for parent, _ in rows.values()}
    apart = {name: parameters[parent][span] for name, (parent, span) in rows.items()}
    plain = {name: tensor for name, tensor in parameters.items() if name not in whole}
    return {original_name(name): tensor for name, tensor in (plain | apart).items()}


def raw_weights():
    return {name.removeprefix("model."): tensor.float() for name, tensor in load_file(MODEL).items()}


def save_lora(path, tensors):
    save_file({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, path)
    return path


@pytest.mark.parametrize("strength", [1.0, 0.6])
@pytest.mark.parametrize("naming", NAMINGS)
def test_merged_weights_are_comfyuis(naming, strength):
    values = load_file(LAYOUTS / "lora_values.safetensors")
    prefix = f"{naming}/{strength}/"
    expected = {name.removeprefix(prefix): tensor for name, tensor in values.items() if name.startswith(prefix)}
    assert len(expected) >= 4
    merged, before = parameters_of(load((lora_file(naming), strength))), raw_weights()
    for name, value in expected.items():
        assert relative_error(merged[name], value) <= 1e-5, name
        assert relative_error(before[name], value) > 1e-3, name


@pytest.mark.parametrize("naming", ["peft", "kohya", "down_up_diff"])
def test_every_layer_is_the_formula_within_bf16(naming):
    """W + s * alpha / r * B A, in float64, for every layer of the file; all other tensors as they were."""
    lora = {key.replace("lora_unet_", "").replace(".", "_"): t for key, t in load_file(lora_file(naming)).items()}
    up, down = ("lora_B", "lora_A") if naming == "peft" else ("lora_up", "lora_down")
    before, merged = raw_weights(), parameters_of(load((lora_file(naming), 0.6), dtype=BF16))
    changed = 0
    for name, weight in before.items():
        layer = name.removesuffix(".weight").replace(".", "_")
        layer = f"diffusion_model_{layer}" if naming != "kohya" else layer
        expected = weight.double()
        if f"{layer}_{up}_weight" in lora and name.endswith(".weight"):
            b, a = lora[f"{layer}_{up}_weight"].double(), lora[f"{layer}_{down}_weight"].double()
            alpha = lora.get(f"{layer}_alpha")
            expected = expected + 0.6 * (1 if alpha is None else alpha.item() / a.shape[0]) * b @ a
            changed += 1
        elif f"{layer.removesuffix('_bias')}_diff_b" in lora and name.endswith(".bias"):
            expected = expected + 0.6 * lora[f"{layer.removesuffix('_bias')}_diff_b"].double()
        elif f"{layer}_diff" in lora:
            expected = expected + 0.6 * lora[f"{layer}_diff"].double()
        ours = merged[name].double()
        # Half a step of bf16, and a little for float32 on the way; what stays in float32 is nearer still.
        assert bool(((ours - expected).abs() <= expected.abs() * 2**-8 + 1e-6).all()), name
    assert changed == 30


@pytest.mark.parametrize("weights", WEIGHT_GRANULARITIES)
@pytest.mark.parametrize("format_", ["fp8", "int8"])
@pytest.mark.parametrize("naming", NAMINGS)
def test_scales_are_those_of_the_merged_weight(tmp_path, naming, format_, weights):
    merged = save_lora(tmp_path / "merged.safetensors", parameters_of(load((lora_file(naming), 0.6))))
    spec = QuantizationSpec(format_, weights)
    ours = load((lora_file(naming), 0.6), dtype=BF16, quantization=spec)
    theirs = load(dtype=BF16, quantization=spec, model=merged)
    plain = load(dtype=BF16, quantization=spec)
    _check_equal(ours, theirs)
    with pytest.raises(AssertionError):
        _check_equal(ours, plain)


def _check_equal(ours, theirs):
    expected = theirs.state_dict()
    for name, tensor in ours.state_dict().items():
        assert torch.equal(tensor.view(torch.uint8), expected[name].view(torch.uint8)), name


def test_strength_0_changes_nothing_and_two_in_a_row_add():
    plain = load(dtype=BF16)
    _check_equal(load(*((lora_file(naming), 0.0) for naming in NAMINGS), dtype=BF16), plain)
    before = raw_weights()
    one, other = (parameters_of(load((lora_file(naming), 0.6))) for naming in ("peft", "down_up_diff"))
    both = parameters_of(load((lora_file("peft"), 0.6), (lora_file("down_up_diff"), 0.6)))
    for name, tensor in both.items():
        assert relative_error(tensor, one[name] + other[name] - before[name]) <= 1e-6, name
    halves = parameters_of(load((lora_file("kohya"), 0.5), (lora_file("kohya"), 0.5)))
    whole = parameters_of(load((lora_file("kohya"), 1.0)))
    assert all(relative_error(tensor, whole[name]) <= 1e-6 for name, tensor in halves.items())


@pytest.mark.parametrize(
    "rename",
    [
        lambda name: f"base_model.model.{name}",
        lambda name: name,
        lambda name: f"transformer.{name}".replace(".weight", ".default.weight"),
        lambda name: f"base_model.model.model._fsdp_wrapped_module.{name}".replace("blocks.0.", "blocks.0._orig_mod."),
        lambda name: f"lycoris_{name.split('.lora')[0].replace('.', '_')}.lora{name.split('.lora')[1]}",
    ],
    ids=["base_model.model", "bare", "transformer, adapter", "wrapped", "lycoris"],
)
def test_other_prefixes_and_wrappers(tmp_path, rename):
    tensors = load_file(lora_file("peft"))
    renamed = {rename(name.removeprefix("diffusion_model.")): tensor for name, tensor in tensors.items()}
    assert set(renamed).isdisjoint(tensors)
    _check_equal(load((save_lora(tmp_path / "lora.safetensors", renamed), 0.6)), load((lora_file("peft"), 0.6)))


def test_diffusers_own_names_mean_the_same(tmp_path):
    """As diffusers itself writes the LoRA that its own converter made of the twin."""
    from diffusers.loaders.lora_conversion_utils import _convert_musubi_wan_lora_to_diffusers

    converted = _convert_musubi_wan_lora_to_diffusers(load_file(lora_file("kohya")))
    assert "transformer.blocks.0.attn1.to_q.lora_A.weight" in converted
    ours = parameters_of(load((save_lora(tmp_path / "lora.safetensors", converted), 1.0)))
    for name, tensor in parameters_of(load((lora_file("kohya"), 1.0))).items():
        assert relative_error(ours[name], tensor) <= 1e-5, name


def test_dora_by_column_and_a_lora_on_a_convolution(tmp_path):
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(shape, generator=generator)  # noqa: E731
    tensors = {
        "diffusion_model.blocks.1.ffn.0.lora_A.weight": draw(3, 128),
        "diffusion_model.blocks.1.ffn.0.lora_B.weight": draw(256, 3),
        "diffusion_model.blocks.1.ffn.0.dora_scale": draw(1, 128).abs(),
        "diffusion_model.patch_embedding.lora_down.weight": draw(2, 16, 1, 2, 2),
        "diffusion_model.patch_embedding.lora_up.weight": draw(128, 2, 1, 1, 1),
        "diffusion_model.patch_embedding.alpha": torch.tensor(1.0),
        "diffusion_model.blocks.2.modulation.diff": draw(1, 6, 128),
    }
    merged = parameters_of(load((save_lora(tmp_path / "lora.safetensors", tensors), 0.7)))
    before = raw_weights()
    up, down, scale, conv_down, conv_up, _, modulation = tensors.values()
    up, down = down, up
    weight = before["blocks.1.ffn.0.weight"]
    whole = weight + up @ down
    whole = whole * scale / whole.norm(dim=0, keepdim=True)
    assert relative_error(merged["blocks.1.ffn.0.weight"], weight + 0.7 * (whole - weight)) <= 1e-5
    patch = before["patch_embedding.weight"]
    expected = patch + 0.35 * (conv_up.flatten(1) @ conv_down.flatten(1)).view(patch.shape)
    assert relative_error(merged["patch_embedding.weight"], expected) <= 1e-5
    expected = before["blocks.2.modulation"] + 0.7 * modulation
    assert relative_error(merged["blocks.2.modulation"], expected) <= 1e-6


@pytest.mark.parametrize(
    "spec",
    [
        QuantizationSpec("fp8", "per tensor", "dynamic per tensor"),
        QuantizationSpec("int8", "per row", "dynamic per row"),
    ],
    ids=lambda spec: spec.format,
)
def test_a_quantized_file_is_quantized_again_where_it_is_changed(tmp_path, spec):
    saved = load(dtype=BF16, quantization=spec)
    path = save_quantized_transformer(saved, tmp_path / "quantized.safetensors")
    tensors = load_file(lora_file("peft"))
    some = {name: t for name, t in tensors.items() if ".1.ffn." in name or ".1.self_attn.q" in name}
    lora = save_lora(tmp_path / "some.safetensors", some)
    component = transformer_component(path, dtype=BF16, loras=choices((lora, 1.0)))
    noted = {layer.name: layer.note for layer in component.plan.layers if layer.note}
    assert set(noted) == {"blocks.1.ffn.net.0.proj", "blocks.1.ffn.net.2", "blocks.1.attn1.to_qkv"}
    assert "quantized again" in noted["blocks.1.ffn.net.2"] and "quantized again" in component.plan.summary()
    reported = []
    ours = component.load("cpu", lambda _, nbytes: reported.append(nbytes))
    assert sum(reported) == component.plan.bytes_after
    stored, before = _dequantized(load(dtype=BF16, model=path)), _dequantized(ours)
    assert set(stored) == set(before) and len(stored) == 24
    for name, weight in before.items():
        change = _change_of(name, some, weight.shape)
        if change is None:
            assert torch.equal(weight, stored[name]), name
        else:
            expected = stored[name] + change
            assert relative_error(weight, expected) < 0.03 < relative_error(stored[name], expected), name
    with pytest.raises(CheckpointError, match="is quantized already"):
        _ = transformer_component(path, dtype=BF16, quantization=spec, loras=choices((lora, 1.0))).plan
    whole = transformer_component(path, dtype=BF16, loras=choices((lora_file("peft"), 1.0))).plan
    assert len([layer for layer in whole.layers if layer.note]) == len(whole.quantized_names) == 24


def _dequantized(transformer):
    weights = {}
    for name, layer in transformer.named_modules():
        if isinstance(layer, FP8Linear | Int8Linear):
            weights[name] = layer.weight.float() * layer.weight_scale.view(-1, 1)
    return weights


def _change_of(name, lora, shape):
    change, found = torch.zeros(shape), False
    parts = {f"{name[:-3]}{part}": index for index, part in enumerate("qkv")} if name.endswith("to_qkv") else {name: 0}
    for part, index in parts.items():
        key = f"diffusion_model.{original_name(part)}"
        if f"{key}.lora_A.weight" in lora:
            product = lora[f"{key}.lora_B.weight"].float() @ lora[f"{key}.lora_A.weight"].float()
            change[index * len(product) : (index + 1) * len(product)] = product
            found = True
    return change if found else None


@pytest.fixture(scope="module")
def larger(tmp_path_factory):
    """A transformer of 60 MB, and a LoRA of rank 64 on its attention and feed-forward layers."""
    folder = tmp_path_factory.mktemp("larger")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformer = WanTransformer3DModel(
            num_attention_heads=4, attention_head_dim=128, text_dim=64, freq_dim=32, ffn_dim=3072, num_layers=3
        )
        transformer.save_pretrained(folder / "transformer")
        pairs = {}
        for name, weight in transformer.named_parameters():
            if name.endswith(".weight") and weight.ndim == 2 and name.startswith("blocks."):
                layer = f"transformer.{name.removesuffix('.weight')}"
                pairs[f"{layer}.lora_A.weight"] = torch.randn(64, weight.shape[1]).to(BF16)
                pairs[f"{layer}.lora_B.weight"] = torch.randn(weight.shape[0], 64).to(BF16)
    save_lora(folder / "lora.safetensors", pairs)
    largest_pair = 4 * 64 * (3072 + 512)
    return folder, folder / "lora.safetensors", largest_pair


@pytest.mark.parametrize("loras", [1, 2])
@pytest.mark.parametrize("weights", WEIGHT_GRANULARITIES)
def test_the_peak_grows_by_one_pair_of_each_lora(larger, weights, loras):
    folder, lora, pair_bytes = larger
    spec = QuantizationSpec("fp8", weights)
    peaks, live = [], []
    for count in (0, loras):
        chosen = choices(*[(lora, 0.5)] * count)
        component = transformer_component(folder, dtype=BF16, quantization=spec, loras=chosen)
        gc.collect()
        with PeakMeter() as counted:
            transformer = component.load("cpu")
        peaks.append(counted.peak_bytes)
        live.append(counted.live_bytes)
        del transformer
    # A pair of each LoRA in float32, and one chunk of rows before the change beside the one behind it.
    assert peaks[0] < peaks[1] <= peaks[0] + loras * pair_bytes + 2**22
    assert live[1] == live[0]


def _refused(tensors, tmp_path):
    save_lora(tmp_path / "refused.safetensors", tensors)
    with pytest.raises(CheckpointError) as error:
        transformer_component(MODEL, dtype=F32, loras=choices((tmp_path / "refused.safetensors", 0.0)))
    text = str(error.value)
    assert str(tmp_path / "refused.safetensors") in text and text.endswith(".") and "\n" not in text
    return text


PAIR = {"blocks.0.ffn.0.lora_A.weight": torch.zeros(4, 128), "blocks.0.ffn.0.lora_B.weight": torch.zeros(256, 4)}


@pytest.mark.parametrize(
    ("tensors", "sentence"),
    [
        ({"single_blocks.0.linear1.lora_A.weight": torch.zeros(4, 8), "single_blocks.0.linear1.lora_B.weight":
          torch.zeros(8, 4)}, "matches no layer of"),
        ({"blocks.0.ffn.0.lora_A.weight": torch.zeros(4, 1536), "blocks.0.ffn.0.lora_B.weight": torch.zeros(8960, 4)},
         r"blocks.0.ffn.0.lora_B.weight [8960, 4] and blocks.0.ffn.0.lora_A.weight [4, 1536], which does not go with "),
        (PAIR | {name.replace(".0.ffn", ".29.ffn"): t for name, t in PAIR.items()}, "of another size"),
        (PAIR | {"blocks.0.ffn.0.dora_scale": torch.zeros(7, 1)}, "of another size"),
        ({"blocks.0.ffn.0.diff_b": torch.zeros(7)}, "of another size"),
        ({"blocks.0.self_attn.norm_q.diff_b": torch.zeros(128)}, "has no bias"),
        (PAIR | {"blocks.0.cross_attn.k_img.lora_A.weight": torch.zeros(4, 128),
                 "blocks.0.cross_attn.k_img.lora_B.weight": torch.zeros(128, 4)}, "image-to-video"),
        ({"blocks.0.ffn.0.lora_A.weight": torch.zeros(4, 128)}, "without the other matrix"),
        (PAIR | {"diffusion_model.blocks.0.ffn.0.lora_A.weight": torch.zeros(4, 128)}, "keep one of the two"),
        ({"blocks.0.ffn.0.hada_w1_a": torch.zeros(4, 128)}, "another kind|kind of adapter"),
        ({"blocks.0.ffn.0.alpha": torch.tensor(1.0)}, "without its matrices"),
        ({name: tensor.to(torch.int8) for name, tensor in PAIR.items()}, "as torch.int8"),
    ],
)  # fmt: skip
def test_a_lora_that_does_not_fit_is_refused_by_name(tmp_path, tensors, sentence):
    assert any(part in _refused(tensors, tmp_path) for part in sentence.split("|"))


def test_a_model_given_as_a_lora_and_a_lora_given_as_a_model():
    with pytest.raises(CheckpointError, match=r"holds no LoRA, its names are like model\.blocks"):
        transformer_component(MODEL, dtype=F32, loras=choices((MODEL, 1.0)))
    with pytest.raises(CheckpointError, match="LoRA"):
        transformer_component(lora_file("peft"), dtype=F32)


def test_bad_files_are_named(tmp_path):
    content = lora_file("peft").read_bytes()
    for text, data in (("is not a complete safetensors file", content[:-10]), ("is a web page", b"<html></html>")):
        (tmp_path / "bad.safetensors").write_bytes(data)
        with pytest.raises(CheckpointError, match=text):
            transformer_component(MODEL, dtype=F32, loras=choices((tmp_path / "bad.safetensors", 1.0)))
    with pytest.raises(CheckpointError, match="cannot be read"):
        transformer_component(MODEL, dtype=F32, loras=choices((tmp_path / "absent.safetensors", 1.0)))
    for naming, part in (("peft", "blocks.1.ffn.2.lora_A.weight"), ("down_up_diff", "blocks.1.self_attn.v.diff_b")):
        tensors = load_file(lora_file(naming))
        tensors[f"diffusion_model.{part}"].view(-1)[3] = math.nan
        bad = save_lora(tmp_path / "nan.safetensors", tensors)
        with pytest.raises(CheckpointError, match=f"{part} in the LoRA .*nan.safetensors holds inf or NaN"):
            load((bad, 1.0))


def test_what_matched_is_told(tmp_path):
    tensors = load_file(lora_file("peft")) | {
        "lora_te1_text_model.lora_A.weight": torch.zeros(1, 4),
        "lora_te1_text_model.lora_B.weight": torch.zeros(4, 1),
        "extra": torch.zeros(1),
    }
    path = save_lora(tmp_path / "with_text.safetensors", tensors)
    component = transformer_component(MODEL, dtype=F32, loras=choices((path, 1.0), (lora_file("dora"), 0.0)))
    told, dora = (match.describe() for match in component.weights.loras)
    assert told == {"file": "with_text.safetensors", "strength": 1.0, "layers": 30, "names_left_out": 2}
    assert dora == {"file": "lora_dora.safetensors", "strength": 0.0, "layers": 30, "names_left_out": 0}
    assert "lora_te1_text_model" in component.weights.loras[0].notice and component.weights.loras[1].notice == ""


def test_the_twins_are_what_they_are_taken_for():
    """So that the tests above cannot pass on files that say something else."""
    for naming, mark in (("kohya", "alpha"), ("down_up_diff", "diff_b"), ("dora", "dora_scale")):
        with safe_open(lora_file(naming), "pt") as file:
            assert any(key.endswith(mark) for key in file.keys()) and json.dumps(file.metadata())  # noqa: SIM118
