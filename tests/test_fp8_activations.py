"""What the quality benchmark does to inputs is what FP8 units would do to them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from streamblocks.benchmarks.fp8_activations import rounded_fp8_activations
from streamblocks.benchmarks.quantize_afterwards import make_fp8_linear
from streamblocks.ops.quantization import QuantizationSpec

SCHEMES = {
    "dynamic per row": "per row",
    "dynamic per tensor": "per tensor",
}


@pytest.fixture
def x():
    return torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(0)).bfloat16()


def make_layer(activations, weights="per row"):
    spec = QuantizationSpec(format="fp8", weight_granularity=weights, activations=activations)
    linear = nn.Linear(64, 48, dtype=torch.bfloat16)
    return make_fp8_linear(linear.weight, linear.bias, spec, name="layer").eval()


@pytest.mark.parametrize("activations", SCHEMES)
def test_the_input_is_the_one_that_the_layer_quantizes_for_the_units(activations, x):
    layer = make_layer(activations, SCHEMES[activations])
    quantized, scale = layer._quantize_input(x.flatten(0, 1))
    rounded = (quantized.float() * scale).bfloat16().view(x.shape)
    assert not torch.equal(rounded, x)
    expected = layer(rounded)
    with rounded_fp8_activations():
        found = layer(x)
    assert torch.equal(found, expected)
    # Outside, the layer is as it was.
    assert torch.equal(layer(x), torch.nn.functional.linear(x, layer.dequantized_weight(x.dtype), layer.bias))


def test_weights_only_and_other_layers_are_left_alone(x):
    layer, linear = make_layer("none"), nn.Linear(64, 48, dtype=torch.bfloat16)
    before = layer(x), linear(x)
    with rounded_fp8_activations():
        assert torch.equal(layer(x), before[0]) and torch.equal(linear(x), before[1])
