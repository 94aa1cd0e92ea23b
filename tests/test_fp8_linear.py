"""The FP8 linear layer: accuracy, what `torch._scaled_mm` is called with, what a forward allocates, bad input."""

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from streamblocks.benchmarks.quantize_afterwards import make_fp8_linear
from streamblocks.ops import fp8_linear
from streamblocks.ops.calibration import calibrating
from streamblocks.ops.fp8_linear import fp8_notice, supports_fp8_matmul
from streamblocks.ops.quantization import ACTIVATIONS, WEIGHT_GRANULARITIES, QuantizationSpec

from tensor_allocations import count_forward_allocations

SCHEMES = [(weights, inputs) for weights in WEIGHT_GRANULARITIES for inputs in ACTIVATIONS]


def _sqnr(reference, result):
    error = result.double() - reference.double()
    return float(10 * torch.log10(reference.double().square().sum() / error.square().sum()))


def _randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _quantize_weight(weight, granularity, name="the layer"):
    layer = make_fp8_linear(weight, None, QuantizationSpec("fp8", granularity, "none"), name=name)
    return layer.weight.data, layer.weight_scale


def _layer(weights="per row", activations="dynamic per row", size=(48, 32), bias=True, **fields):
    spec = QuantizationSpec("fp8", weights, activations, **fields)
    weight = _randn(*size, seed=1).bfloat16()
    return make_fp8_linear(weight, _randn(size[0], seed=2).bfloat16() if bias else None, spec)


class ScaledMatmul:
    """Stands in for `torch._scaled_mm`: refuses what the kernel refuses, then computes in float64."""

    def __init__(self):
        self.calls = []

    def __call__(self, a, b, *, scale_a, scale_b, bias, out_dtype, use_fast_accum):
        assert a.dtype == b.dtype == torch.float8_e4m3fn
        assert a.is_contiguous() and b.t().is_contiguous(), "first operand row-major, second column-major"
        assert b.shape[0] % 16 == 0 and b.shape[1] % 16 == 0
        assert scale_a.dtype == scale_b.dtype == torch.float32
        assert scale_a.is_contiguous() and scale_b.is_contiguous()
        tensor_wise = scale_a.numel() == 1 and scale_b.numel() == 1
        row_wise = scale_a.shape == (a.shape[0], 1) and scale_b.shape == (1, b.shape[1])
        assert tensor_wise or row_wise
        if not tensor_wise:
            assert out_dtype == torch.bfloat16
        assert bias is None or bias.dtype == out_dtype
        self.calls.append((a, b, scale_a, scale_b, bias, out_dtype, use_fast_accum))
        # One operator makes the result, as the kernel does; what it needs is taken out of the counter's sight.
        with torch.utils._python_dispatch._disable_current_modes():
            product = (a.double() * scale_a) @ (b.double() * scale_b)
            product = product if bias is None else product + bias.double()
            exact = product.to(out_dtype)
        return exact.clone()


@pytest.fixture
def scaled_mm(monkeypatch):
    """FP8 units everywhere, computed on the CPU."""
    stand_in = ScaledMatmul()
    monkeypatch.setattr(torch, "_scaled_mm", stand_in)
    monkeypatch.setattr(fp8_linear, "supports_fp8_matmul", lambda device: True)
    return stand_in


@pytest.mark.parametrize("granularity", WEIGHT_GRANULARITIES)
def test_a_quantized_weight_is_within_half_a_step(granularity):
    weight = _randn(64, 48).bfloat16()
    quantized, scale = _quantize_weight(weight, granularity)
    assert quantized.dtype == torch.float8_e4m3fn and scale.dtype == torch.float32
    assert scale.shape == ((1, 64) if granularity == "per row" else (1, 1))
    restored = quantized.float() * scale.t()
    # 3 mantissa bits: half a step is 1/16 of the number, or half of the smallest step near zero.
    assert torch.all((restored - weight).abs() <= weight.float().abs() / 16 + scale.t() * 2**-10)
    assert quantized.float().abs().max() == 448


def test_rows_of_zeros_stay_zero_and_tiny_rows_survive():
    weight = torch.zeros(16, 16)
    weight[1] = 1e-30
    quantized, scale = _quantize_weight(weight, "per row")
    assert torch.isfinite(scale).all() and (scale > 0).all()
    torch.testing.assert_close(quantized.float() * scale.t(), weight, rtol=0.07, atol=0)


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("granularity", WEIGHT_GRANULARITIES)
def test_inf_and_nan_name_the_layer(value, granularity):
    weight = torch.ones(16, 16)
    weight[3, 4] = value
    with pytest.raises(ValueError, match=r"blocks\.7\.ffn holds inf or NaN"):
        _quantize_weight(weight, granularity, name="blocks.7.ffn")


@pytest.mark.parametrize(("weights", "activations"), SCHEMES)
def test_gaussian_weights_and_activations_keep_28_db(scaled_mm, weights, activations):
    weight, x = _randn(1536, 1536, seed=1).bfloat16(), _randn(128, 1536, seed=2).bfloat16()
    layer = make_fp8_linear(weight, None, QuantizationSpec("fp8", weights, activations))
    if activations == "static":
        with calibrating(layer):
            layer(x)
    sqnr = _sqnr(F.linear(x.double(), weight.double()), layer(x))
    assert sqnr >= (31 if activations == "none" else 28)


@pytest.mark.parametrize("granularity", WEIGHT_GRANULARITIES)
def test_the_sqnr_is_within_a_third_of_a_db_of_torchao(granularity):
    torchao = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    weight, x = _randn(1536, 1536, seed=1).bfloat16(), _randn(64, 1536, seed=2).bfloat16()
    theirs = nn.Linear(1536, 1536, bias=False, dtype=torch.bfloat16)
    theirs.weight.data.copy_(weight)
    scheme = torchao.PerRow() if granularity == "per row" else torchao.PerTensor()
    torchao.quantize_(theirs, torchao.Float8WeightOnlyConfig(granularity=scheme, set_inductor_config=False))
    ours = make_fp8_linear(weight, None, QuantizationSpec("fp8", granularity, "none"))
    reference = F.linear(x.double(), weight.double())
    with torch.no_grad():
        assert abs(_sqnr(reference, ours(x)) - _sqnr(reference, theirs(x))) < 0.3


def test_with_an_outlier_channel_per_row_beats_per_tensor(scaled_mm):
    weight, x = _randn(1536, 1536, seed=1), _randn(128, 1536, seed=2).bfloat16()
    weight[7] *= 100
    weight = weight.bfloat16()
    # The other channels: the outlier's own size would hide what happens to them.
    others = torch.arange(1536) != 7
    reference = F.linear(x.double(), weight.double())[:, others]
    results = {}
    for granularity, activations in [("per row", "dynamic per row"), ("per tensor", "dynamic per tensor")]:
        layer = make_fp8_linear(weight, None, QuantizationSpec("fp8", granularity, activations))
        results[granularity] = _sqnr(reference, layer(x)[:, others])
    assert results["per row"] > results["per tensor"]


def test_with_an_outlier_input_channel_per_row_beats_per_tensor(scaled_mm):
    weight, x = _randn(1536, 1536, seed=1).bfloat16(), _randn(128, 1536, seed=2)
    x[:, 7] *= 100
    x = x.bfloat16()
    reference = F.linear(x.double(), weight.double())
    row = make_fp8_linear(weight, None, QuantizationSpec("fp8", "per row", "dynamic per row"))
    tensor = make_fp8_linear(weight, None, QuantizationSpec("fp8", "per tensor", "dynamic per tensor"))
    assert _sqnr(reference, row(x)) > _sqnr(reference, tensor(x)) + 1


@pytest.mark.parametrize(("weights", "activations"), SCHEMES)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_the_kernel_computes_what_the_dequantized_layer_does(scaled_mm, weights, activations, bias):
    layer = _layer(weights, activations, bias=bias)
    x = _randn(2, 5, 32, seed=3).bfloat16()
    expected = F.linear(x, layer.dequantized_weight(), layer.bias)
    assert _sqnr(expected, layer(x)) > 25
    assert len(scaled_mm.calls) == (activations != "none")


def test_the_kernel_gets_fast_accumulation_and_the_bias(scaled_mm):
    x = _randn(3, 32).bfloat16()
    for fast in (True, False):
        layer = _layer(fast_accumulation=fast)
        layer(x)
        *_, bias, out_dtype, use_fast_accum = scaled_mm.calls[-1]
        assert use_fast_accum is fast and bias is layer.bias and out_dtype == torch.bfloat16


@pytest.mark.parametrize(("weights", "activations"), SCHEMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(32,), (1, 32), (0, 32), (2, 0, 32), (2, 3, 4, 32)], ids=str)
def test_any_leading_shape_and_dtype(scaled_mm, weights, activations, dtype, shape):
    layer = _layer(weights, activations)
    layer.bias.data = layer.bias.data.to(dtype)
    out = layer(_randn(*shape).to(dtype))
    assert out.shape == (*shape[:-1], 48) and out.dtype == dtype


@pytest.mark.parametrize("shape", [(32,), (0, 32), (2, 3, 32)], ids=str)
def test_any_leading_shape_without_fp8_units(shape):
    assert _layer()(torch.ones(shape, dtype=torch.bfloat16)).shape == (*shape[:-1], 48)


FP8, F32, BF16 = torch.float8_e4m3fn, torch.float32, torch.bfloat16


@pytest.mark.parametrize("weights", WEIGHT_GRANULARITIES)
@pytest.mark.parametrize(
    ("activations", "scale"),
    [("dynamic per row", [((10, 1), F32)]), ("dynamic per tensor", [((1, 1), F32)]), ("static", [])],
)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_a_forward_allocates_quantized_input_dynamic_scale_and_output(scaled_mm, weights, activations, scale, bias):
    layer = _layer(weights, activations, bias=bias)
    x = _randn(2, 5, 32).bfloat16()
    if activations == "static":
        with calibrating(layer):
            layer(x)
    assert count_forward_allocations(layer, x) == [*scale, ((10, 32), FP8), ((10, 48), BF16)]


def test_without_fp8_units_a_forward_allocates_the_dequantized_weight_and_the_output():
    x = _randn(10, 32).bfloat16()
    assert count_forward_allocations(_layer(), x) == [((48, 32), BF16), ((10, 48), BF16)]


# In a separate process: compiling leaves fake tensors alive, which would break tests that count live tensors.
COMPILE = Path(__file__).with_name("compile_fp8_linear.py")


def test_no_graph_break():
    run = subprocess.run([sys.executable, COMPILE], capture_output=True, text=True, timeout=300)
    assert run.returncode == 0 and "compiled" in run.stdout, run.stderr[-3000:]


def test_whether_the_kernel_runs_is_decided_when_weights_move_and_not_in_a_forward(monkeypatch):
    asked = []

    def no_units(device):
        asked.append(device)
        return False

    monkeypatch.setattr(fp8_linear, "supports_fp8_matmul", no_units)
    layer = _layer()
    layer(_randn(3, 32).bfloat16())
    layer(_randn(3, 32).bfloat16())
    assert len(asked) == 1
    layer.to("cpu")
    assert len(asked) == 2


def test_changing_the_dtype_of_a_model_keeps_the_quantized_weight():
    layer = _layer().to(torch.float32)
    assert layer.weight.dtype == FP8 and layer.weight_scale.dtype == F32 and layer.bias.dtype == F32
    assert layer.half().weight_scale.dtype == F32
    assert layer(_randn(3, 32).half()).dtype == torch.float16


def test_a_state_dict_and_a_deep_copy_give_the_same_layer():
    layer, x = _layer(), _randn(3, 32).bfloat16()
    other = copy.deepcopy(layer)
    other.weight.data.zero_()
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x), layer(x))
    assert set(layer.state_dict()) == {"weight", "weight_scale", "bias"}
    assert not any(parameter.requires_grad for parameter in layer.parameters())


def test_static_scales_clamp_what_lies_beyond_the_calibration(scaled_mm):
    layer = _layer("per tensor", "static", bias=False)
    x = _randn(3, 32).bfloat16()
    with calibrating(layer):
        layer(x)
    quantized, scale = layer._quantize_input((x * 8).float().contiguous())
    assert torch.equal(scale, (x.float().abs().max() / 448).reshape(1, 1))
    assert quantized.float().abs().max() == 448 and torch.isfinite(layer(x * 8)).all()


def test_the_bytes_of_overflow_become_the_largest_numbers():
    # The results of a cast that does not saturate, for every number of the format.
    quantized = torch.arange(256, dtype=torch.uint8).view(FP8)
    expected = torch.nan_to_num(quantized.float().masked_fill(quantized.float().isnan(), 0))
    expected[127], expected[255] = 448, -448
    fp8_linear._saturate(quantized)
    assert torch.equal(quantized.float(), expected)


def test_static_layers_work_before_calibration_and_calibrating_needs_some(scaled_mm):
    assert torch.isfinite(_layer("per tensor", "static")(_randn(3, 32).bfloat16())).all()
    with pytest.raises(ValueError, match="0 layers have static"), calibrating(_layer()):
        pass


def test_a_device_without_fp8_units_is_named():
    assert not supports_fp8_matmul("cpu")
    assert "saves memory there but no time" in fp8_notice("cpu")


@pytest.mark.skipif(not supports_fp8_matmul("cuda"), reason="no CUDA device with FP8 units")
@pytest.mark.parametrize(("weights", "activations"), SCHEMES)
@pytest.mark.parametrize("fast", [True, False], ids=["fast", "slow"])
def test_on_fp8_units(weights, activations, fast):
    weight, x = _randn(1536, 1536, seed=1).cuda().bfloat16(), _randn(2, 77, 1536, seed=2).cuda().bfloat16()
    bias = _randn(1536, seed=3).cuda().bfloat16()
    layer = make_fp8_linear(weight, bias, QuantizationSpec("fp8", weights, activations, fast))
    if activations == "static":
        with calibrating(layer):
            layer(x)
        assert torch.isfinite(layer(x * 8)).all()
    assert _sqnr(F.linear(x.double(), weight.double(), bias.double()), layer(x)) >= 28
    for leading in [(0,), (1,), (17,), (2, 0)]:
        assert layer(x.new_ones((*leading, 1536))).shape == (*leading, 1536)
    if activations != "none":
        dynamic = {"dynamic per row": [((154, 1), F32)], "dynamic per tensor": [((1, 1), F32)]}.get(activations, [])
        expected = [*dynamic, ((154, 1536), FP8), ((154, 1536), BF16)]
        assert count_forward_allocations(layer, x) == expected
