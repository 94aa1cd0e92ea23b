"""The INT8 linear layer: torchao's weights, accuracy beside torchao's own layer, exact integer products."""

import copy
import sys

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from streamblocks.benchmarks.quantize_afterwards import quantize_layer, quantize_model
from streamblocks.ops import int8
from streamblocks.ops.int8 import Int8Linear, require_torchao
from streamblocks.ops.quantization import WEIGHT_GRANULARITIES, QuantizationSpec, plan_layers
from streamblocks.wan.checkpoints.layer_presets import PRESETS

pytest.importorskip("torchao", reason="torchao is not installed")

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


def _by_torchao(linear, weights="per row", activations="dynamic per row"):
    """torchao's own layer of `linear`, which is kept."""
    torchao = require_torchao()
    granularity = {"per row": torchao.PerRow(), "per tensor": torchao.PerTensor()}
    if activations == "none":
        config = torchao.Int8WeightOnlyConfig(granularity=granularity[weights], set_inductor_config=False)
    else:
        both = [granularity[activations.removeprefix("dynamic ")], granularity[weights]]
        config = torchao.Int8DynamicActivationInt8WeightConfig(granularity=both, set_inductor_config=False)
    theirs = copy.deepcopy(linear)
    torchao.quantize_(theirs, config)
    return theirs


def _sqnr(reference, result):
    error = result.double() - reference
    return float(10 * torch.log10(reference.square().sum() / error.square().sum()))


@pytest.mark.parametrize(("weights", "activations"), SCHEMES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_numbers_are_those_of_torchao(weights, activations, dtype):
    """Row chunks of more than one, so that a scale per tensor is that of all of them."""
    plain = _linear(1040, 1040, dtype)
    theirs = _by_torchao(plain, weights, activations).weight
    ours = _quantized(plain, weights, activations)
    assert torch.equal(ours.weight, theirs.qdata)
    assert torch.equal(ours.weight_scale.t(), theirs.scale)
    assert not theirs.zero_point.any()


@pytest.mark.parametrize("weights", WEIGHT_GRANULARITIES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_weights_only_equals_torchaos_layer_to_the_bit(weights, dtype):
    plain = _linear(dtype=dtype)
    theirs = _by_torchao(plain, weights, "none")
    x = _randn(2, 20, 32, seed=3).to(dtype)
    assert torch.equal(_quantized(plain, weights, "none")(x), theirs(x))


@pytest.mark.parametrize(("activations", "least"), [("none", 41), ("dynamic per row", 38)])
def test_the_sqnr_is_within_half_a_db_of_torchaos_layer(activations, least):
    """Ours is at least as good but for 0.1 dB: scales of the inputs reach 127, torchao's 127.5."""
    plain = _linear(1536, 1536)
    x = _randn(128, 1536, seed=3).bfloat16()
    reference = F.linear(x.double(), plain.weight.double(), plain.bias.double())
    ours = _sqnr(reference, _quantized(plain, activations=activations)(x))
    theirs = _sqnr(reference, _by_torchao(plain, activations=activations)(x))
    assert ours >= least
    assert theirs - 0.1 < ours < theirs + 0.5


@pytest.mark.parametrize("weights", WEIGHT_GRANULARITIES)
def test_a_quantized_weight_is_within_half_a_step(weights):
    plain = _linear()
    before = plain.weight.float()
    layer = _quantized(plain, weights)
    assert layer.weight.dtype == torch.int8
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


@pytest.mark.parametrize(("activations", "off"), [("none", 0.5), ("dynamic per row", 0.1)])
def test_large_float16_inputs_do_not_overflow(activations, off):
    layer = _quantized(_linear(64, 4096, torch.float16), activations=activations)
    x = torch.full((40, 4096), 8.0, dtype=torch.float16)
    expected = F.linear(x.double(), layer.weight.double() * layer.weight_scale.double().t(), layer.bias.double())
    assert float(expected.abs().max()) < 65504
    torch.testing.assert_close(layer(x).double(), expected, rtol=2e-3, atol=off)


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


def test_without_integer_products_only_weights_are_rounded(monkeypatch):
    monkeypatch.setattr(int8, "supports_int8_matmul", lambda device: False)
    monkeypatch.delattr(torch, "_int_mm")
    x = _randn(40, 32).bfloat16()
    assert torch.equal(_quantized(_linear())(x), _by_torchao(_linear(), activations="none")(x))


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


def test_a_missing_torchao_is_said_clearly(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    with pytest.raises(ValueError, match="pip install torchao"):
        quantize_model(_model(), _plan(QuantizationSpec("int8")))


@pytest.mark.parametrize(
    ("cuda", "capability", "expected"), [("13.0", (7, 5), True), ("13.0", (7, 0), False), (None, (9, 4), False)]
)
def test_integer_products_are_for_turing_and_later_not_for_rocm(monkeypatch, cuda, capability, expected):
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert int8.supports_int8_matmul("cuda") is expected
