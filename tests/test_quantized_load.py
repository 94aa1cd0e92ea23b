"""Quantizing while loading: equal to quantizing afterwards, and never more memory than promised."""

import gc

import pytest
import torch
from diffusers import WanTransformer3DModel
from safetensors.torch import load_file, save_file

from streamblocks.benchmarks.quantize_afterwards import quantize_model
from streamblocks.memory.peak_meter import PeakMeter
from streamblocks.memory.tensor_bytes import live_tensor_bytes
from streamblocks.ops.fp8_linear import FP8Linear
from streamblocks.ops.int8 import Int8Linear
from streamblocks.ops.quantization import WEIGHT_GRANULARITIES, QuantizationSpec
from streamblocks.ops.weight_filling import weight_magnitude

from wan_loading import component_bytes, load_text_encoder, load_transformer, plan_for

SCHEMES = [(format_, weights) for format_ in ("fp8", "int8") for weights in WEIGHT_GRANULARITIES]
BF16 = torch.bfloat16


@pytest.fixture(scope="module")
def larger(tmp_path_factory):
    """A transformer of 60 MB in several shards, in float32 as Wan's own are, so that it is converted too."""
    folder = tmp_path_factory.mktemp("larger")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformer = WanTransformer3DModel(
            num_attention_heads=4, attention_head_dim=128, text_dim=64, freq_dim=32, ffn_dim=3072, num_layers=3
        )
    transformer.save_pretrained(folder / "transformer", max_shard_size="11MB")
    assert len(list((folder / "transformer").glob("*.safetensors"))) > 3
    return folder


def _velocity(transformer, text_dim=48):
    generator = torch.Generator().manual_seed(3)
    latents = torch.randn(1, 16, 3, 4, 6, generator=generator).bfloat16()
    text = torch.randn(1, 7, text_dim, generator=generator).bfloat16()
    with torch.no_grad():
        return transformer(latents, torch.tensor([700.0]), text).sample


@pytest.mark.parametrize(("format_", "weights"), SCHEMES)
@pytest.mark.parametrize("which", ["tiny", "larger"])
def test_the_module_equals_one_quantized_after_loading(tiny_folder, larger, format_, weights, which):
    folder = tiny_folder if which == "tiny" else larger
    spec = QuantizationSpec(format_, weights)
    on_the_way = load_transformer(folder, device="cpu", dtype=BF16, quantization=spec)
    afterwards = load_transformer(folder, device="cpu", dtype=BF16)
    plan = plan_for(folder, "transformer", torch.bfloat16, spec)
    quantize_model(afterwards, plan)
    for name in plan.quantized_names:
        ours, theirs = on_the_way.get_submodule(name), afterwards.get_submodule(name)
        assert type(ours) is type(theirs) and type(ours.weight.data) is type(theirs.weight.data)
        assert type(ours) is (FP8Linear if format_ == "fp8" else Int8Linear)
        assert torch.equal(ours.weight.view(torch.uint8), theirs.weight.view(torch.uint8))
        assert torch.equal(ours.weight_scale, theirs.weight_scale)
    text_dim = 48 if which == "tiny" else 64
    assert torch.equal(_velocity(on_the_way, text_dim), _velocity(afterwards, text_dim))
    assert not any(parameter.requires_grad for parameter in on_the_way.parameters())


@pytest.mark.parametrize(("format_", "weights"), SCHEMES)
def test_the_peak_is_within_the_promise(larger, format_, weights):
    """The promise is 64 MiB beyond quantized model and largest layer in BF16; here almost none of it is used."""
    spec = QuantizationSpec(format_, weights)
    plan = plan_for(larger, "transformer", torch.bfloat16, spec)
    load_transformer(larger, device="cpu", dtype=BF16, quantization=spec)  # torchao's own set-up
    gc.collect()
    with PeakMeter() as counted:
        transformer = load_transformer(larger, device="cpu", dtype=BF16, quantization=spec)
    largest_in_bf16 = max(torch.Size(layer.shape).numel() * 2 for layer in plan.layers)
    rotary = sum(buffer.nbytes for name, buffer in transformer.named_buffers() if "rope" in name)
    assert plan.bytes_after < counted.peak_bytes <= plan.bytes_after + rotary + largest_in_bf16 + 2**26
    # A handful of chunks of 4 MB in float32.
    assert counted.peak_bytes <= plan.bytes_after + rotary + 6 * 2**22
    assert counted.live_bytes == pytest.approx(plan.bytes_after + rotary, rel=0.01)


@pytest.mark.parametrize(("format_", "weights"), SCHEMES)
def test_live_bytes_while_loading_and_reported_bytes(larger, format_, weights):
    spec = QuantizationSpec(format_, weights)
    plan = plan_for(larger, "transformer", torch.bfloat16, spec)
    before, seen, reported = live_tensor_bytes(), [], []

    def watch(name, nbytes):
        reported.append(nbytes)
        if len(reported) % 15 == 0:
            # A count of all tensors of the process takes a while.
            seen.append(live_tensor_bytes() - before)

    transformer = load_transformer(larger, device="cpu", dtype=BF16, quantization=spec, on_tensor=watch)
    assert sum(reported) == plan.bytes_after == component_bytes(larger, "transformer", BF16, spec)
    largest = max(torch.Size(layer.shape).numel() * 2 for layer in plan.layers)
    assert max(seen) <= plan.bytes_after + largest + 2**26
    assert sum(1 for module in transformer.modules() if isinstance(module, FP8Linear)) == (
        len(plan.quantized_names) if format_ == "fp8" else 0
    )


@pytest.mark.parametrize("format_", ["fp8", "int8"])
def test_a_text_encoder_is_quantized_when_it_is_named(tiny_folder, format_):
    spec = QuantizationSpec(format_, activations="none", components=("text_encoder",))
    tokens = torch.arange(2, 12)[None]
    with torch.no_grad():
        plain = load_text_encoder(tiny_folder, device="cpu", dtype=BF16)(tokens)[0]
        encoder = load_text_encoder(tiny_folder, device="cpu", dtype=BF16, quantization=spec)
        quantized = encoder(tokens)[0]
    error = (quantized - plain).float().square().sum() / plain.float().square().sum()
    assert 0 < error < 10 ** (-15 / 10)
    assert load_transformer(tiny_folder, device="cpu", dtype=BF16, quantization=spec).blocks[0].attn1.to_qkv
    assert plan_for(tiny_folder, "text_encoder", BF16, spec).quantized_names


@pytest.mark.parametrize("weights", WEIGHT_GRANULARITIES)
def test_inf_in_a_file_names_the_layer(tiny_folder, tmp_path, weights):
    target = tmp_path / "transformer"
    target.mkdir()
    for path in (tiny_folder / "transformer").iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    file = target / "diffusion_pytorch_model.safetensors"
    state = load_file(file)
    state["blocks.1.attn1.to_k.weight"][3, 5] = float("inf")
    save_file(state, file)
    with pytest.raises(ValueError, match=r"blocks\.1\.attn1\.to_qkv holds inf or NaN"):
        load_transformer(tmp_path, device="cpu", dtype=BF16, quantization=QuantizationSpec("fp8", weights))


@pytest.mark.parametrize("odd", [0.0, float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("granularity", "dim"), [("per row", -1), ("per tensor", (0, 1))])
def test_the_largest_magnitude_is_torchs_norm(granularity, dim, dtype, odd):
    values = torch.randn(5, 77, generator=torch.Generator().manual_seed(0)).to(dtype)
    values[2, 6] = odd
    values[3] = -values[3].abs()
    expected = torch.linalg.vector_norm(values, ord=float("inf"), dim=dim, keepdim=True, dtype=torch.float32)
    torch.testing.assert_close(weight_magnitude(values, granularity), expected, rtol=0, atol=0, equal_nan=True)


def test_all_memory_is_allocated_before_the_first_row_is_read(larger):
    held = []
    before = live_tensor_bytes()
    module = load_transformer(
        larger,
        device="cpu",
        dtype=BF16,
        quantization=QuantizationSpec("fp8"),
        on_tensor=lambda name, nbytes: held.append(live_tensor_bytes() - before),
    )
    whole = live_tensor_bytes() - before
    # Between two tensors nothing but the rows just read comes and goes.
    assert min(held) >= 0.99 * whole
    del module
