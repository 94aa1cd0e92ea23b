"""The transformer's Triton kernels: attention to a short prompt, GELU while quantizing."""

from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel
from diffusers.models.transformers.transformer_wan import WanAttention, WanAttnProcessor
from torch.nn import functional as F

from streamblocks.benchmarks.quantize_afterwards import make_fp8_linear
from streamblocks.ops.few_key_attention import MOST_KEYS, attend_to_few_keys, merge_padding
from streamblocks.ops.fp8_linear import FP8_MAX, supports_fp8_matmul
from streamblocks.ops.head_quantization import HeadScales
from streamblocks.ops.kernels.few_key_launch import FEW_KEY_ATTENTION, FewKeyVariant
from streamblocks.ops.kernels.rotary_store_launch import ROTARY_STORE, ROTARY_STORE_FP8, RotaryVariant
from streamblocks.ops.quantization import QuantizationSpec
from streamblocks.wan.transformer import rotary_store
from streamblocks.wan.transformer.attention_passes import SelfAttentionPass
from streamblocks.wan.transformer.causal_transformer import allocate_cross_cache, fill_cross_cache
from streamblocks.wan.transformer.installed_attention import install_causal_attention
from streamblocks.wan.transformer.rope import FrameOffsetRotaryEmbedding

from plain_attention import attend_to_all, pad
from triton_interpreter import errors_of

ON_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: the Triton kernels are not run")


def test_the_kernels_in_tritons_interpreter():
    errors = errors_of("interpret_transformer_kernels.py")
    assert len(errors) == 17
    assert max(errors.values()) < 1e-5, errors


def tiny_transformer():
    torch.manual_seed(0)
    return WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, text_dim=8, freq_dim=16,
        ffn_dim=32, num_layers=2, cross_attn_norm=True, qk_norm="rms_norm_across_heads",
    ).eval().requires_grad_(False)  # fmt: skip


@pytest.mark.parametrize("words", [0, 1, 40, MOST_KEYS - 1])
def test_a_short_prompt_gives_the_same_attention_by_few_keys(words):
    transformer = tiny_transformer()
    install_causal_attention(transformer)
    cache = allocate_cross_cache(transformer, text_tokens=512)
    embeds = torch.zeros(1, 512, 8)
    embeds[:, :words] = torch.randn(1, words, 8)
    fill_cross_cache(transformer, cache, embeds, "prompt")
    assert cache.few is not None
    query = torch.randn(1, 30, 2, 16)
    for key, value in zip(cache.keys, cache.values, strict=True):
        whole = attend_to_all(query, key, value)
        few = attend_to_few_keys(query, key, value, cache.few)
        assert torch.allclose(few, whole, atol=1e-6)


@pytest.mark.parametrize(("words", "text_tokens"), [(MOST_KEYS, 512), (512, 512), (16, 16)])
def test_other_prompts_keep_all_their_keys(words, text_tokens):
    transformer = tiny_transformer()
    install_causal_attention(transformer)
    cache = allocate_cross_cache(transformer, text_tokens=text_tokens)
    embeds = torch.zeros(1, text_tokens, 8)
    embeds[:, :words] = 1.0
    cache.few = merge_padding(1, 512)
    fill_cross_cache(transformer, cache, embeds, "prompt")
    assert cache.few is None


def test_without_cuda_there_is_no_kernel():
    device, dtype = torch.device("cpu"), torch.bfloat16
    assert FEW_KEY_ATTENTION.load(device, dtype, FewKeyVariant(128)) is None
    assert ROTARY_STORE.load(device, dtype, RotaryVariant(5120, 128)) is None
    layer = make_fp8_linear(torch.randn(16, 16), None, QuantizationSpec("fp8", "per row", "dynamic per row"))
    assert not layer.take_gelu()


@ON_CUDA
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("words", [0, 32, MOST_KEYS - 1])
def test_few_keys_on_cuda(words, compiled):
    torch.manual_seed(words)
    draw = lambda tokens: torch.randn(1, tokens, 5, 128, device="cuda", dtype=torch.bfloat16)  # noqa: E731
    query, key, value = draw(1000), pad(draw(512), words), pad(draw(512), words)
    whole = attend_to_all(query.float(), key.float(), value.float())
    few = merge_padding(words, 512, device="cuda")
    kernel = FEW_KEY_ATTENTION.load(query.device, query.dtype, FewKeyVariant(128))
    assert few is not None and kernel is not None
    attend = torch.compile(attend_to_few_keys, fullgraph=True) if compiled else attend_to_few_keys
    made = attend(query, key, value, few, kernel)
    assert (made.float() - whole).abs().max() < 0.02


@pytest.mark.skipif(not supports_fp8_matmul("cuda"), reason="no FP8 units: GELU is not fused into the quantization")
@pytest.mark.parametrize("compiled", [False, True])
def test_gelu_while_quantizing_on_cuda(compiled):
    torch.manual_seed(0)
    spec = QuantizationSpec("fp8", "per row", "dynamic per row")
    weight = torch.randn(256, 13824, device="cuda", dtype=torch.bfloat16)
    layer = make_fp8_linear(weight, None, spec)
    x = 2 * torch.randn(1, 500, 13824, device="cuda", dtype=torch.bfloat16)
    expected = layer(F.gelu(x.float(), approximate="tanh")).float()
    assert layer.take_gelu()
    made = (torch.compile(layer, fullgraph=True) if compiled else layer)(x).float()
    assert (made - expected).norm() / expected.norm() < 5e-3


@ON_CUDA
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("fused", [False, True])
def test_norm_rotary_and_store_on_cuda(fused, compiled):
    torch.manual_seed(0)
    heads, tokens, past, dim = 40, 12, 6, 5120
    attn = WanAttention(dim=dim, heads=heads, dim_head=128, processor=WanAttnProcessor()).to("cuda", torch.bfloat16)
    for norm in (attn.norm_q, attn.norm_k):
        norm.weight.data.normal_()
    rope = FrameOffsetRotaryEmbedding(128, (1, 2, 2))
    table = rope(torch.empty(1, 1, 1, 6, 8, device="cuda"))
    projected = torch.randn(1, tokens, 3 * dim, device="cuda").bfloat16().chunk(3, dim=-1)
    parts = [part if fused else part.contiguous() for part in projected]
    store: Any = rotary_store.store_block
    if compiled:
        store = torch.compile(store, fullgraph=True, dynamic=False)
    # Separate memory, as in the cache: compiled code cannot write to two views of one tensor.
    keys, values = (torch.ones(1, past + tokens + 1, heads, 128, device="cuda").bfloat16() for _ in range(2))
    kernel = ROTARY_STORE.load(keys.device, keys.dtype, RotaryVariant(dim, 128))
    assert kernel is not None
    by_kernel = SelfAttentionPass(keys, values, past, None, None, kernel=kernel)
    made_query = store(attn, rotary_store.Projections(*parts), table, by_kernel)
    wide = SelfAttentionPass(torch.ones_like(keys).float(), torch.ones_like(values).float(), past, None, None)
    wide_parts = rotary_store.Projections(*(part.float() for part in parts))
    query = rotary_store.store_block(attn.float(), wide_parts, table, wide)
    results = (made_query, *by_kernel[:2]), (query, *wide[:2])
    for made, expected in zip(*results, strict=True):
        assert (made.float() - expected).abs().max() < 0.01 * expected.abs().max()


@pytest.mark.skipif(not supports_fp8_matmul("cuda"), reason="no FP8 conversions: keys are not stored in 8 bits")
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("past", [0, 6])
def test_norm_rotary_and_store_in_8_bits_on_cuda(past, compiled):
    """As near as torch's own operations, which round to bfloat16 between norm and rotation, to the same in float32."""
    torch.manual_seed(0)
    heads, tokens, dim = 40, 12, 5120
    attn = WanAttention(dim=dim, heads=heads, dim_head=128, processor=WanAttnProcessor()).to("cuda", torch.bfloat16)
    for norm in (attn.norm_q, attn.norm_k):
        norm.weight.data.normal_()
    table = FrameOffsetRotaryEmbedding(128, (1, 2, 2))(torch.empty(1, 1, 1, 6, 8, device="cuda"))
    parts = rotary_store.Projections(*torch.randn(1, tokens, 3 * dim, device="cuda").bfloat16().chunk(3, dim=-1))
    kernel = ROTARY_STORE_FP8.load(torch.device("cuda"), torch.bfloat16, RotaryVariant(dim, 128))
    assert kernel is not None
    store: Any = rotary_store.store_block
    if compiled:
        store = torch.compile(store, fullgraph=True, dynamic=False)
    results = []
    for used, by in ((kernel, store), (None, rotary_store.store_block)):
        keys, values = (torch.zeros(1, past + tokens, heads, 128, device="cuda").to(torch.float8_e4m3fn) for _ in "kv")
        scales = HeadScales(*(torch.full((1, heads), 0.01, device="cuda") for _ in range(3)))
        bound = SelfAttentionPass(
            keys, values, past, None, None, kernel=used, scales=scales, attends_in_8_bits=True, library="flash3_fp8"
        )
        results.append((by(attn, parts, table, bound), keys, values, *scales))
    wide = rotary_store.Projections(*(part.float() for part in parts))
    exact = (*rotary_store.norm_and_rotate(attn.float(), wide, table), rotary_store.split_heads(wide.value, heads))

    def errors(query, keys, values, *scales):
        stored = query, keys[:, past:], values[:, past:]
        for made, scale, expected in zip(stored, scales, exact, strict=True):
            assert made.dtype == torch.float8_e4m3fn
            largest = scale[..., None] * FP8_MAX
            expected = expected.clamp(-largest, largest)
            yield (made.float() * scale[..., None] - expected).norm() / expected.norm()

    for by_kernel, by_torch in zip(errors(*results[0]), errors(*results[1]), strict=True):
        assert by_kernel <= 1.001 * by_torch < 0.04
    for scale, expected in zip(results[0][3:], results[1][3:], strict=True):
        assert torch.allclose(scale, expected, rtol=0.01)
