"""The INT8 linear layer: accuracy, exact integer products, torchao's own layer beside it, devices without products."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from streamblocks.benchmarks.quantize_afterwards import quantize_layer, quantize_model
from streamblocks.ops import int8_linear
from streamblocks.ops.int8_linear import Int8Linear
from streamblocks.ops.quantization import WEIGHT_GRANULARITIES, QuantizationSpec, plan_layers
from streamblocks.wan.checkpoints.layer_presets import PRESETS

LAYER, OTHER = "blocks.0.attn1.to_q", "blocks.0.attn1.to_out.0"
SCHEMES = [
    (weights, inputs)
    for weights in WEIGHT_GRANULARITIES
    for inputs in ("none", "dynamic per row", "dynamic per tensor")
]


def _randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _linear(rows=48, columns=32, dtype=torch.bfloat16):
    linear = nn.Linear(columns, rows, dtype=dtype).requires_grad_(False)
    linear.weight.copy_(_randn(rows, columns, seed=1))
    linear.bias.copy_(_randn(rows, seed=2))
    return linear


def _quantized(linear, weights="per row", activations="dynamic per row"):
    layer = quantize_layer(linear, QuantizationSpec("int8", weights, activations))
    assert type(layer) is Int8Linear
    return layer


def _sqnr(reference, result):
    error = result.double() - reference
    return float(10 * torch.log10(reference.square().sum() / error.square().sum()))


@pytest.mark.parametrize(("activations", "least"), [("none", 41), ("dynamic per row", 38)])
def test_gaussian_weights_and_activations_and_torchaos_layer_of_the_same(activations, least):
    torchao = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    plain = _linear(1536, 1536)
    x = _randn(128, 1536, seed=3).bfloat16()
    reference = F.linear(x.double(), plain.weight.double(), plain.bias.double())
    ours = _sqnr(reference, _quantized(copy.deepcopy(plain), activations=activations)(x))
    assert ours >= least
    config = torchao.Int8WeightOnlyConfig if activations == "none" else torchao.Int8DynamicActivationInt8WeightConfig
    torchao.quantize_(plain, config(set_inductor_config=False))
    theirs = _sqnr(reference, plain(x))
    assert theirs - 0.1 < ours < theirs + 0.5


@pytest.mark.parametrize("weights", WEIGHT_GRANULARITIES)
def test_a_quantized_weight_is_within_half_a_step(weights):
    plain = _linear()
    before = plain.weight.float()
    layer = _quantized(plain, weights)
    assert layer.weight.dtype == torch.int8 and layer.weight.abs().max() == 127
    assert layer.weight_scale.shape == ((1, 48) if weights == "per row" else (1, 1))
    step = layer.weight_scale.t()
    assert torch.all((layer.weight.float() * step - before).abs() <= step * 0.5001)


@pytest.mark.parametrize(("weights", "activations"), SCHEMES)
@pytest.mark.parametrize("tokens", [1, 16, 40])
def test_the_product_is_that_of_the_integers(weights, activations, tokens):
    """Float32 inputs: only the roundings to INT8 separate the layer from float64."""
    layer = _quantized(_linear(64, 1024, torch.float32), weights, activations)
    x = _randn(2, tokens, 1024, seed=3)
    weight = layer.weight.double() * layer.weight_scale.double().t()
    rounded = x.double()
    if activations != "none":
        scale = x.abs().amax(dim=-1, keepdim=True) if activations == "dynamic per row" else x.abs().max()
        scale = scale.double() / 127
        rounded = (x / scale.float()).round().double() * scale
    expected = F.linear(rounded, weight, layer.bias.double())
    assert float((layer(x) - expected).norm() / expected.norm()) < 1e-6
    assert layer(x[:, :0]).shape == (2, 0, 64)


def test_large_float16_inputs_do_not_overflow():
    layer = _quantized(_linear(64, 4096, torch.float16))
    x = torch.full((40, 4096), 8.0, dtype=torch.float16)
    expected = F.linear(x.double(), layer.weight.double() * layer.weight_scale.double().t(), layer.bias.double())
    assert float(expected.abs().max()) < 65504
    torch.testing.assert_close(layer(x).double(), expected, rtol=2e-3, atol=0.1)


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_inputs_that_are_not_finite_are_not_hidden(value):
    x = _randn(40, 32).bfloat16()
    x[3, 4] = value
    finite = _quantized(_linear())(x).isfinite().all(dim=-1)
    assert not finite[3] and finite.sum() == 39


def test_no_forward_prints_a_tensor(monkeypatch):
    """torchao's layer formats its input, which makes the host wait for the card."""
    layer = _quantized(_linear())

    def refuse(*_, **__):
        raise AssertionError("a forward printed a tensor")

    monkeypatch.setattr(torch.Tensor, "__repr__", refuse)
    assert layer(_randn(40, 32).bfloat16()).shape == (40, 48)


def test_without_integer_products_the_weight_is_dequantized(monkeypatch):
    monkeypatch.setattr(int8_linear, "supports_int8_matmul", lambda device: False)
    monkeypatch.delattr(torch, "_int_mm")
    layer = _quantized(_linear())
    x = _randn(40, 32).bfloat16()
    assert torch.equal(layer(x), F.linear(x, layer.dequantized_weight(x.dtype), layer.bias))


def test_a_cast_keeps_integers_and_scale():
    layer = _quantized(_linear(dtype=torch.float32)).to(torch.bfloat16)
    assert (layer.weight.dtype, layer.weight_scale.dtype) == (torch.int8, torch.float32)
    assert layer.bias.dtype == torch.bfloat16


def _model():
    attention = nn.Module()
    attention.to_q = _linear(32, 32)
    attention.to_out = nn.ModuleList([_linear(32, 32)])
    block, model = nn.Module(), nn.Module()
    block.attn1 = attention
    model.blocks = nn.ModuleList([block])
    return model


def _plan(spec):
    return plan_layers({LAYER: (32, 32), OTHER: (32, 32)}, spec, "transformer", PRESETS["transformer"])


def test_only_planned_layers_are_quantized():
    model = _model()
    quantize_model(model, _plan(QuantizationSpec("int8", skip=("*to_q",))))
    assert type(model.get_submodule(OTHER)) is Int8Linear and type(model.get_submodule(LAYER)) is nn.Linear


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_inf_and_nan_name_the_layer(value):
    model = _model()
    model.get_submodule(OTHER).weight.data[3, 4] = value
    with pytest.raises(ValueError, match=r"to_out\.0 holds inf or NaN"):
        quantize_model(model, _plan(QuantizationSpec("int8")))
