"""torchao's INT8 through our layer filter: accuracy, which layers, and equality with filling row by row."""

import sys

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from streamblocks.benchmarks.quantize_afterwards import quantize_model
from streamblocks.ops.int8 import int8_config, is_int8, require_torchao
from streamblocks.ops.quantization import WEIGHT_GRANULARITIES, QuantizationSpec, plan_layers
from streamblocks.wan.checkpoints.layer_presets import PRESETS

pytest.importorskip("torchao", reason="torchao is not installed")

LAYER, OTHER = "blocks.0.attn1.to_q", "blocks.0.attn1.to_out.0"
SCHEMES = [(weights, inputs) for weights in WEIGHT_GRANULARITIES for inputs in ("none", "dynamic per row")]


def _model(size=1536):
    attention = nn.Module()
    attention.to_q = nn.Linear(size, size, dtype=torch.bfloat16)
    attention.to_out = nn.ModuleList([nn.Linear(size, size, dtype=torch.bfloat16)])
    block, model = nn.Module(), nn.Module()
    block.attn1 = attention
    model.blocks = nn.ModuleList([block])
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator))
    return model


def _plan(spec, size=1536):
    return plan_layers({LAYER: (size, size), OTHER: (size, size)}, spec, "transformer", PRESETS["transformer"])


def _sqnr(reference, result):
    return float(10 * torch.log10(reference.square().sum() / (result.detach().double() - reference).square().sum()))


@pytest.mark.parametrize(("activations", "least"), [("none", 41), ("dynamic per row", 38)])
def test_gaussian_weights_and_activations(activations, least):
    model = _model()
    layer = model.get_submodule(LAYER)
    x = torch.randn(128, 1536, generator=torch.Generator().manual_seed(2)).bfloat16()
    reference = F.linear(x.double(), layer.weight.double(), layer.bias.double())
    plain = nn.Linear(1536, 1536, dtype=torch.bfloat16)
    plain.load_state_dict(layer.state_dict())
    quantize_model(model, _plan(QuantizationSpec("int8", "per row", activations)))
    ours = _sqnr(reference, model.get_submodule(LAYER)(x))
    assert ours >= least

    torchao = require_torchao()
    config = torchao.Int8WeightOnlyConfig if activations == "none" else torchao.Int8DynamicActivationInt8WeightConfig
    torchao.quantize_(plain, config(set_inductor_config=False))
    assert abs(ours - _sqnr(reference, plain(x))) < 0.3


@pytest.mark.parametrize(("weights", "activations"), SCHEMES)
def test_row_by_row_equals_torchaos_quantize(weights, activations):
    spec = QuantizationSpec("int8", weights, activations)
    by_rows, whole = _model(), _model()
    quantize_model(by_rows, _plan(spec))
    require_torchao().quantize_(whole, int8_config(spec), filter_fn=lambda _, name: name in (LAYER, OTHER))
    for name in (LAYER, OTHER):
        ours, theirs = by_rows.get_submodule(name).weight, whole.get_submodule(name).weight
        assert torch.equal(ours.qdata, theirs.qdata) and torch.equal(ours.scale, theirs.scale)
        assert ours.block_size == theirs.block_size and ours.dtype == theirs.dtype
        assert torch.equal(ours.zero_point, theirs.zero_point)
        x = torch.randn(3, 1536, generator=torch.Generator().manual_seed(2)).bfloat16()
        assert torch.equal(by_rows.get_submodule(name)(x), whole.get_submodule(name)(x))


def test_only_planned_layers_are_quantized():
    model = _model(32)
    quantize_model(model, _plan(QuantizationSpec("int8", skip=("*to_q",)), 32))
    assert is_int8(model.get_submodule(OTHER).weight.data) and not is_int8(model.get_submodule(LAYER).weight.data)


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_inf_and_nan_name_the_layer(value):
    model = _model(32)
    model.get_submodule(OTHER).weight.data[3, 4] = value
    with pytest.raises(ValueError, match=r"to_out\.0 holds inf or NaN"):
        quantize_model(model, _plan(QuantizationSpec("int8"), 32))


def test_a_missing_torchao_is_said_clearly(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    with pytest.raises(ValueError, match="pip install torchao"):
        quantize_model(_model(32), _plan(QuantizationSpec("int8"), 32))
