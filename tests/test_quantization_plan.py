"""What is quantized and what is not: specifications, presets, skip patterns, summaries, and plans from headers."""

import json

import pytest
import torch

from streamblocks.ops.quantization import QuantizationSpec, plan_layers, summarise_plan
from streamblocks.wan.checkpoints.layer_presets import PRESETS

from wan_loading import component_bytes, plan_for

PRESET = PRESETS["transformer"]

SHAPES = {
    "patch_embedding": (64, 16, 1, 2, 2),
    "condition_embedder.time_embedder.linear_1": (64, 32),
    "condition_embedder.text_embedder.linear_1": (64, 48),
    "blocks.0.scale_shift_table": (1, 6, 64),
    "blocks.0.attn1.to_qkv": (192, 64),
    "blocks.0.attn1.to_out.0": (64, 64),
    "blocks.0.attn2.to_q": (64, 64),
    "blocks.0.ffn.net.0.proj": (120, 64),
    "blocks.0.ffn.net.2": (64, 120),
    "proj_out": (64, 64),
}


def test_the_transformer_preset_takes_attention_and_feed_forward_and_says_why_the_others_stay():
    plan = plan_layers(SHAPES, QuantizationSpec("fp8"), "transformer", PRESET)
    assert plan.quantized_names == ("blocks.0.attn1.to_qkv", "blocks.0.attn1.to_out.0", "blocks.0.attn2.to_q")
    reasons = {layer.name: layer.reason for layer in plan.layers}
    assert "patch embedding" in reasons["patch_embedding"] and "head" in reasons["proj_out"]
    assert "time embedding" in reasons["condition_embedder.time_embedder.linear_1"]
    assert "text embedding" in reasons["condition_embedder.text_embedder.linear_1"]
    assert "modulation" in reasons["blocks.0.scale_shift_table"]
    assert "multiple of 16" in reasons["blocks.0.ffn.net.0.proj"] and "multiple of 16" in reasons["blocks.0.ffn.net.2"]


def test_bytes_before_and_after():
    plan = plan_layers(
        {"blocks.0.attn1.to_qkv": (192, 64)},
        QuantizationSpec("fp8"),
        "transformer",
        PRESET,
        other_bytes=10,
    )
    assert plan.bytes_before == 192 * 64 * 2 + 10 and plan.bytes_after == 192 * 64 + 192 * 4 + 10


def test_the_summaries_account_for_every_layer():
    plan = plan_layers(SHAPES, QuantizationSpec("int8", skip=("blocks.0.attn2.*",)), "transformer", PRESET)
    text, fields = plan.summary(), json.loads(json.dumps(summarise_plan(plan)))
    assert "skip pattern 'blocks.0.attn2.*'" in text and "multiple of 16" in text and "MB before" in text
    assert fields["layers_quantized"] + sum(fields["layers_kept"].values()) == len(SHAPES)
    assert fields["bytes_before"] > fields["bytes_after"] > 0
    assert plan.spec is not None
    assert QuantizationSpec.from_dict(json.loads(json.dumps(plan.spec.as_dict()))) == plan.spec


@pytest.mark.parametrize(
    ("pattern", "message"),
    [("blocks.9.*", "matches no layer .* blocks.0.attn1.to_qkv"), ("*", "leaves no layer"), ("blocks.*", "leaves no")],
)
def test_a_pattern_that_matches_nothing_or_everything_is_refused(pattern, message):
    with pytest.raises(ValueError, match=message):
        plan_layers(SHAPES, QuantizationSpec("fp8", skip=(pattern,)), "transformer", PRESET)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"format": "fp4"}, "format is 'fp4'"),
        ({"format": "fp8", "weight_granularity": "per block"}, "weight_granularity is 'per block'"),
        ({"format": "fp8", "activations": "sometimes"}, "activations is 'sometimes'"),
        ({"format": "int8", "activations": "static"}, "INT8 does not support"),
        ({"format": "fp8", "components": ("vae",)}, "never quantized"),
        ({"format": "fp8", "components": ("tokenizer",)}, "components is 'tokenizer'"),
        ({"format": "fp8", "components": ()}, "components is empty"),
        ({"format": "fp8", "skip": ("text_encoder:*",)}, "skip has the pattern"),
    ],
    ids=str,
)
def test_wrong_specifications(fields, message):
    with pytest.raises(ValueError, match=message):
        QuantizationSpec(**fields)


def test_a_pattern_belongs_to_the_component_before_its_colon():
    spec = QuantizationSpec("fp8", components=("transformer", "text_encoder"), skip=("a.*", "text_encoder:b.*"))
    assert spec.skip_patterns("transformer") == ("a.*",) and spec.skip_patterns("text_encoder") == ("b.*",)


@pytest.mark.parametrize("component", ["transformer", "vae", "text_encoder"])
def test_a_component_that_was_not_asked_for_stays(tiny_folder, component):
    other = "text_encoder" if component == "transformer" else "transformer"
    spec = QuantizationSpec("fp8", components=(other,))
    plan = plan_for(tiny_folder, component, torch.bfloat16, spec)
    assert not plan.quantized_names
    assert plan.bytes_after == plan.bytes_before == component_bytes(tiny_folder, component, torch.bfloat16)


def test_the_text_encoder_is_optional_and_keeps_wo_in_fp8(tiny_folder):
    spec = QuantizationSpec("fp8", components=("text_encoder",))
    plan = plan_for(tiny_folder, "text_encoder", torch.bfloat16, spec)
    assert "encoder.block.0.layer.0.SelfAttention.q" in plan.quantized_names
    assert "encoder.block.1.layer.1.DenseReluDense.wi_0" in plan.quantized_names
    reasons = {layer.name: layer.reason for layer in plan.layers}
    assert "wo in FP8" in reasons["encoder.block.0.layer.1.DenseReluDense.wo"]
    assert "table" in reasons["shared"]


def test_a_plan_of_the_transformer_reads_headers_only(tiny_folder):
    plan = plan_for(tiny_folder, "transformer", torch.bfloat16, QuantizationSpec("fp8"))
    assert "blocks.1.attn1.to_qkv" in plan.quantized_names and plan.bytes_after < plan.bytes_before
    assert plan_for(tiny_folder, "transformer", torch.bfloat16, None).bytes_before == plan.bytes_before
