"""Layers whose norms are one pass with residual and quantization: beside diffusers' forward, to the bit."""

from typing import ClassVar

import pytest
import torch
from torch.nn import functional as F

from streamblocks.benchmarks.quantize_afterwards import quantize_layer
from streamblocks.ops import fp8_linear
from streamblocks.ops.fp8_linear import QuantizedRows
from streamblocks.ops.kernels.layer_norm_launch import Residual, RowScaling
from streamblocks.ops.normed_rows import add_and_norm
from streamblocks.ops.quantization import QuantizationSpec
from streamblocks.wan.transformer import attention
from streamblocks.wan.transformer.fused_norms import (
    LayerNormKernels,
    LayerNorms,
    Quantizes,
    has_plain_layer_norms,
    what_takes_rows,
)

from small_wan import make_components, make_pipeline, stream

PROJECTIONS = ("attn1.to_qkv", "attn1.to_out.0", "attn2.to_q", "attn2.to_out.0", "ffn.net.0.proj", "ffn.net.2")


@pytest.mark.parametrize("gated", [False, True])
def test_rows_are_those_of_torchs_layer_norm_and_of_the_fp8_layer(gated):
    draw = lambda *shape: torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)))  # noqa: E731
    hidden, added, gain, shift, gate = draw(2, 5, 32).bfloat16(), draw(2, 5, 32).bfloat16(), *draw(3, 2, 32)
    layer = fp8_layer()
    scaling, residual = RowScaling(gain, shift, True, 1e-6), Residual(added, gate if gated else None)
    summed, rows = add_and_norm(hidden, scaling, residual, quantize=True)
    for group in range(2):
        expected = hidden[group].float() + added[group].float() * (gate[group] if gated else 1.0)
        assert torch.equal(summed[group], expected.bfloat16())
        normed = F.layer_norm(summed[group].float(), (32,), eps=1e-6) * (1 + gain[group]) + shift[group]
        quantized, scale = layer._quantize_input(normed.bfloat16())
        assert isinstance(rows, QuantizedRows) and rows.dtype == torch.bfloat16
        assert torch.equal(rows.quantized[group].float(), quantized.float())
        assert torch.equal(rows.scale.view(2, 5, 1)[group], scale)


def fp8_layer():
    spec = QuantizationSpec("fp8", "per row", "dynamic per row")
    layer = quantize_layer(torch.nn.Linear(32, 48, dtype=torch.bfloat16), spec)
    assert isinstance(layer, fp8_linear.FP8Linear)
    layer._row_wise = True
    return layer


class TorchNorms(LayerNormKernels):
    """Fuses norms as on a card, but computes them with torch; notes what it chose."""

    chosen: ClassVar[list[Quantizes]] = []

    @classmethod
    def of_pass(cls, device, dtype):
        return cls(device, dtype)

    def choose(self, block, hidden, temb):
        if not has_plain_layer_norms(block):
            return None
        self.chosen.append(what_takes_rows(block))
        return LayerNorms(None, self.chosen[-1])


@pytest.fixture
def torch_norms(monkeypatch):
    """Switch the fused norms on, at a call."""
    monkeypatch.setattr(TorchNorms, "chosen", [])

    def switch_on():
        monkeypatch.setattr(attention, "LayerNormKernels", TorchNorms)
        return TorchNorms.chosen

    return switch_on


@pytest.fixture(scope="module")
def components():
    return make_components()


@pytest.fixture
def fp8_units(monkeypatch):
    """FP8 layers as on a card; the product itself in float64, which is the same for equal operands."""

    def multiply(a, b, *, scale_a, scale_b, bias, out_dtype, use_fast_accum):
        made = (a.double() * scale_a) @ (b.double() * scale_b)
        return (made if bias is None else made + bias).to(out_dtype)

    monkeypatch.setattr(fp8_linear, "supports_fp8_matmul", lambda device: True)
    monkeypatch.setattr(torch, "_scaled_mm", multiply)


def quantized_pipeline(components, **options):
    pipe = make_pipeline(components, **options)
    transformer = pipe.transformer.bfloat16()
    spec = QuantizationSpec("fp8", "per row", "dynamic per row")
    for block in transformer.blocks:
        for name in PROJECTIONS:
            parent, _, leaf = name.rpartition(".")
            setattr(block.get_submodule(parent), leaf, quantize_layer(block.get_submodule(name), spec))
    return pipe


def latents_of(pipe, blocks=2, **settings):
    """Of the last block; the second has a past."""
    return stream(pipe, blocks=blocks, last="remember_block", **settings)[0][-1]


@pytest.mark.parametrize("fuse_context", [False, True])
def test_fp8_layers_take_rows_and_give_the_bits_of_diffusers_forward(components, fp8_units, torch_norms, fuse_context):
    pipe = quantized_pipeline(components)
    expected = latents_of(pipe, kv_policy="rolling", fuse_context=fuse_context)
    chosen = torch_norms()
    made = latents_of(pipe, kv_policy="rolling", fuse_context=fuse_context)
    assert set(chosen) == {(True, True, True)}
    assert torch.equal(made, expected)


@pytest.mark.parametrize("fused", [False, True])
def test_other_layers_take_normed_rows(components, torch_norms, fused):
    pipe = make_pipeline(components, fused=fused)
    expected = latents_of(pipe)
    chosen = torch_norms()
    made = latents_of(pipe)
    assert set(chosen) == {(False, False, False)}
    # diffusers' norm2 applies its weight inside torch's layer_norm: the same but for rounding.
    assert torch.allclose(made, expected, atol=1e-4)


def test_what_is_watched_sees_what_it_saw(components, fp8_units, torch_norms):
    pipe = quantized_pipeline(components)
    first, second, *_ = pipe.transformer.blocks
    seen = []
    for module in (first.norm3, second.ffn):
        module.register_forward_hook(lambda module, inputs, made: seen.append((module, inputs[0].dtype)))
    second.attn1.to_qkv.register_forward_pre_hook(lambda module, inputs: seen.append((module, inputs[0].dtype)))
    expected = latents_of(pipe)
    before, chosen = seen[:], torch_norms()
    seen.clear()
    assert torch.equal(latents_of(pipe), expected)
    assert seen == before and {dtype for module, dtype in seen if module is not first.norm3} == {torch.bfloat16}
    assert set(chosen) == {(False, True, False), (True, True, True)}


@pytest.mark.usefixtures("fresh_dynamo")
def test_a_compiled_layer_hands_rows_on_without_a_break(components, fp8_units, torch_norms):
    torch_norms()
    expected = latents_of(quantized_pipeline(components), blocks=1)
    made = latents_of(quantized_pipeline(components, backend="eager"), blocks=1)
    assert torch.equal(made, expected)
