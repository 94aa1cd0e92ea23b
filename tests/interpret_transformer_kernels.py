"""Run the transformer's Triton kernels in Triton's interpreter, without a GPU, beside torch; prints errors as JSON.

A separate program, because Triton reads TRITON_INTERPRET when a kernel is defined.
"""

import itertools
import json
import os
from unittest import mock

os.environ["TRITON_INTERPRET"] = "1"

import torch
from diffusers.models.transformers.transformer_wan import WanAttention, WanAttnProcessor
from torch.nn import functional as F

from streamblocks.ops.few_key_attention import MOST_KEYS, attend_to_few_keys, merge_padding
from streamblocks.ops.fp8_linear import FP8_MAX, SMALLEST_SCALE, fp8_scale, largest_magnitude
from streamblocks.ops.kernels import layer_norm_launch
from streamblocks.ops.kernels.few_key_launch import FEW_KEY_ATTENTION, FewKeyVariant
from streamblocks.ops.kernels.gelu_quantization_launch import GELU_QUANTIZATION, GeluVariant
from streamblocks.ops.kernels.kernel import TRIALS, Kernel, launch
from streamblocks.ops.kernels.layer_norm_launch import (
    LAYER_NORM,
    LayerNormVariant,
    Residual,
    RowScaling,
    launch_layer_norm,
)
from streamblocks.ops.kernels.rotary_store_launch import (
    ROTARY_STORE,
    ROTARY_STORE_FP8,
    RotaryVariant,
    RowNorm,
    launch_rotary_store,
    launch_rotary_store_fp8,
)
from streamblocks.ops.normed_rows import add_and_norm
from streamblocks.wan.transformer import rotary_store
from streamblocks.wan.transformer.attention_passes import SelfAttentionPass
from streamblocks.wan.transformer.rope import FrameOffsetRotaryEmbedding
from streamblocks.wan.transformer.rotary_store import Projections

from plain_attention import attend_to_all, pad
from triton_interpreter import mend_interpreter

CPU = torch.device("cpu")


def few_keys(words, text_tokens=512):
    """Against attention over all keys, padding included."""
    query, key, value = (torch.randn(1, tokens, 3, 32) for tokens in (150, text_tokens, text_tokens))
    key, value, few = pad(key, words), pad(value, words), merge_padding(words, text_tokens)
    assert few is not None
    # In float32: the interpreter has as many bits as torch. A GPU has fewer, so the kernel refuses float32.
    assert FEW_KEY_ATTENTION.load(CPU, torch.float16, FewKeyVariant(32)) is not None
    kernel = FEW_KEY_ATTENTION.source()
    whole, made = attend_to_all(query, key, value), attend_to_few_keys(query, key, value, few, kernel)
    return float((made - whole).abs().max())


def gelu_and_rows(columns):
    """Against torch's GELU and the scale of our own quantization; before rounding, which the interpreter truncates."""
    x = (3 * torch.randn(7, columns)).bfloat16()
    x[3] = 0
    quotients, scales = torch.empty(7, columns), torch.empty(7, 1)
    kernel = GELU_QUANTIZATION.load(CPU, x.dtype, GeluVariant(columns))
    constants = {"LARGEST": FP8_MAX, "SMALLEST_SCALE": SMALLEST_SCALE, "BLOCK": 256}
    launch(kernel, (7,), CPU, x, quotients, scales, columns, **constants)
    expected = F.gelu(x.float(), approximate="tanh")
    scale = fp8_scale(largest_magnitude(expected, "per row"))
    return float((scales / scale - 1).abs().max() + (quotients - expected / scale).abs().max() / FP8_MAX)


def norm_rotate_store(heads, head_dim, fused):
    """Against the fallback in torch, which fills the same cache."""
    tokens, past, dim = 6, 4, heads * head_dim
    attn = WanAttention(dim=dim, heads=heads, dim_head=head_dim, eps=1e-3, processor=WanAttnProcessor())
    for norm in (attn.norm_q, attn.norm_k):
        norm.weight.data.normal_()
    rope = FrameOffsetRotaryEmbedding(head_dim, (1, 2, 2))
    rope.frame_offset = 5
    table = rope(torch.empty(1, 1, 1, 4, 6))
    parts = torch.randn(1, tokens, 3 * dim).chunk(3, dim=-1) if fused else torch.randn(3, 1, tokens, dim)
    results = []
    by_kernel = ROTARY_STORE.load(CPU, torch.float32, RotaryVariant(dim, head_dim))
    assert by_kernel is not None
    for kernel in (by_kernel, None):
        keys, values = torch.ones(2, 1, past + tokens + 1, heads, head_dim)
        bound = SelfAttentionPass(keys, values, past, None, None, kernel=kernel)
        results.append((rotary_store.store_block(attn, Projections(*parts), table, bound), keys, values))
    return max(float((made - expected).abs().max()) for made, expected in zip(*results, strict=True))


def add_norm_quantize(columns, form, quantize):
    """Against torch; before rounding to FP8, as above. Two groups of rows, each with a modulation of its own."""
    rows, modulation = torch.randn(3, 2, 2, columns), torch.randn(6, 2, columns)
    gated = form == "gated"
    residual = None if form == "alone" else Residual(rows[1], modulation[2] if gated else None)
    vectors = modulation[:2, :1] if gated else modulation[:2]
    scaling = RowScaling(vectors[0], vectors[1], not gated, 1e-3)
    variant = LayerNormVariant(columns, residual is not None, gated, not gated, quantize)
    with mock.patch.object(layer_norm_launch, "FP8_DTYPE", torch.float32):
        kernel = LAYER_NORM.load(CPU, torch.float32, variant)
        assert kernel is not None
        made = launch_layer_norm(kernel, rows[0] + 0.5, scaling, residual, quantize=quantize)
    summed, expected = add_and_norm(rows[0] + 0.5, scaling, residual, quantize=False)
    assert isinstance(expected, torch.Tensor)
    error = float((made.summed - summed).abs().max())
    if made.scale is not None:
        scale = fp8_scale(largest_magnitude(expected.view(-1, columns), "per row"))
        error += float((made.scale / scale - 1).abs().max())
        expected = expected / scale.view(2, 2, 1)
    return error + float((made.normed - expected).abs().max() / expected.abs().max())


def norm_rotate_quantize(heads, head_dim, fused):
    """Against the kernel above, divided; before rounding, which the interpreter truncates."""
    tokens, past, dim = 6, 4, heads * head_dim
    norms = RowNorm(torch.randn(dim), 1e-3), RowNorm(torch.randn(dim), 1e-3)
    rope = FrameOffsetRotaryEmbedding(head_dim, (1, 2, 2))
    table = rope(torch.empty(1, 1, 1, 4, 6))[0]
    parts = torch.randn(1, tokens, 3 * dim).chunk(3, dim=-1) if fused else torch.randn(3, 1, tokens, dim)
    scales = 0.5 + torch.rand(3, 1, heads)
    # Some values are out of range.
    scales[2] *= 1e-3
    plain, keys = (
        torch.ones(2, 1, past + tokens + 1, heads, head_dim),
        torch.ones(1, past + tokens + 1, heads, head_dim),
    )
    query = launch_rotary_store(ROTARY_STORE.source(), tuple(parts), norms, table, plain[0], plain[1], past)
    kernel, values = ROTARY_STORE_FP8.source(), torch.ones_like(keys)
    stores = table, tuple(scales), keys, values, past, torch.float32
    made = launch_rotary_store_fp8(kernel, tuple(parts), norms, *stores)
    results = [(made, query / scales[0][..., None])]
    for given, stored, scale in zip(plain, (keys, values), scales[1:], strict=True):
        given[:, past:-1] = (given[:, past:-1] / scale[..., None]).clamp(-FP8_MAX, FP8_MAX)
        results.append((stored, given))
    assert float(values.abs().max()) == FP8_MAX
    return max(float((one - other).abs().max() / other.abs().max()) for one, other in results)


if __name__ == "__main__":
    torch.manual_seed(0)
    torch.set_grad_enabled(False)
    mend_interpreter()
    with mock.patch.object(Kernel, "_refuses_device", lambda self, device: None):
        errors = {f"{words} words": few_keys(words) for words in (0, 5, MOST_KEYS - 1)}
        errors |= {f"{columns} columns": gelu_and_rows(columns) for columns in (256, 200)}
        cases = itertools.product(((2, 16), (3, 32)), (True, False))
        for size, fused in cases:
            errors[f"rotary {size} {fused}"] = norm_rotate_store(*size, fused)
            errors[f"rotary, 8 bits {size} {fused}"] = norm_rotate_quantize(*size, fused)
        # 80 columns are 64 + 16, 100 are 64 + 36 of 64.
        forms = ((80, "gated", True), (80, "alone", False), (100, "alone", True), (100, "added", True))
        errors |= {f"layer norm {form}": add_norm_quantize(*form) for form in forms}
    assert not TRIALS.failed, TRIALS
    print(json.dumps(errors))
