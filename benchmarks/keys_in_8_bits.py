"""One layer's self-attention by FlashAttention 3 in 8 bits: keys quantized in each call, or once, as they are written.

    python benchmarks/keys_in_8_bits.py                        # 14B and 1.3B; half a minute on an H200
    python benchmarks/keys_in_8_bits.py --device cpu           # tiny, emulated

From the projections to the attended values, compiled as in a stream: norm, RoPE, the cache, quantizing, attention.
Times are medians; errors |made - exact| / |exact| over two heads, exact in float32 from the same projections. The
kernel that writes 8 bits is compared with the same in torch: "differs" counts numbers that are not equal, which sums in
another order leave to be a few in a thousand.
"""

from __future__ import annotations

import argparse
from contextlib import nullcontext
from typing import NamedTuple

import streamblocks_path  # noqa: F401
import torch
from attention_kinds import SHAPES, exact_attention, relative_error
from device_rates import AttentionShape, time_call
from diffusers.models.transformers.transformer_wan import WanAttention, WanAttnProcessor
from emulated_flash3 import emulated_flash3
from floors import device_of

from streamblocks.ops.attention_backends import FLASH3_FP8
from streamblocks.ops.flash3 import flash3
from streamblocks.ops.fp8_linear import FP8_DTYPE
from streamblocks.ops.head_quantization import HeadScales
from streamblocks.ops.kernels.rotary_store_launch import ROTARY_STORE, ROTARY_STORE_FP8, RotaryVariant
from streamblocks.ops.library_attention import attend, explain, load
from streamblocks.wan.transformer.attention_passes import SelfAttentionPass
from streamblocks.wan.transformer.rope import FrameOffsetRotaryEmbedding, RotaryTable
from streamblocks.wan.transformer.rotary_store import Projections, store_block


class Layer(NamedTuple):
    """One layer's norms, and the projections of its past and of its block with their rotary tables."""

    attn: WanAttention
    past: tuple[Projections, RotaryTable]
    block: tuple[Projections, RotaryTable]


def make_layer(shape: AttentionShape, device: torch.device, dtype: torch.dtype) -> Layer:
    """Random numbers for as many tokens as `shape` has; those of the past are larger."""
    torch.manual_seed(0)
    dim = shape.heads * shape.head_dim
    attn = WanAttention(dim=dim, heads=shape.heads, dim_head=shape.head_dim, processor=WanAttnProcessor())
    attn = attn.requires_grad_(False).to(device, dtype)
    for norm in (attn.norm_q, attn.norm_k):
        norm.weight.normal_(1.0, 0.3)
    rope = FrameOffsetRotaryEmbedding(shape.head_dim, (1, 1, 1))
    parts, spread = [], 2.0
    for tokens in (shape.keys - shape.queries, shape.queries):
        projected = spread * torch.randn(1, tokens, 3 * dim, device=device)
        table = rope(torch.empty(1, 1, 1, 1, tokens, device=device))
        parts.append((Projections(*projected.to(dtype).chunk(3, dim=-1)), table))
        spread = 1.0
    return Layer(attn, *parts)


def bound_pass(layer: Layer, *, eight_bits: bool, kernel: object, device: torch.device) -> SelfAttentionPass:
    """A pass behind the past, whose keys are in the cache."""
    projections, table = layer.past
    past, dim = projections.key.shape[1:]
    heads = layer.attn.heads
    shape = (1, past + layer.block[0].key.shape[1], heads, dim // heads)
    dtype = FP8_DTYPE if eight_bits else projections.key.dtype
    keys, values = (torch.zeros(shape, device=device).to(dtype) for _ in range(2))
    scales = HeadScales.allocate(heads, device) if eight_bits else None
    bound = SelfAttentionPass(
        keys, values, 0, None, None, kernel=kernel, library=FLASH3_FP8, scales=scales, attends_in_8_bits=eight_bits
    )
    store_block(layer.attn, projections, table, bound)
    return bound._replace(past=past)


def store_layer(layer: Layer, bound: SelfAttentionPass) -> torch.Tensor:
    """The block's queries; its keys and values go into the cache."""
    projections, table = layer.block
    return store_block(layer.attn, projections, table, bound)


def run_layer(layer: Layer, bound: SelfAttentionPass) -> torch.Tensor:
    """Attend from the block to everything."""
    query = store_layer(layer, bound)
    if bound.scales is not None:
        return flash3(query, bound.keys, bound.values, *bound.scales)
    return attend(FLASH3_FP8, query, bound.keys, bound.values)


def exact_values(layer: Layer, device: torch.device) -> torch.Tensor:
    """float32, the first heads only."""
    wide = [(Projections(*(part.float() for part in parts)), table) for parts, table in (layer.past, layer.block)]
    exact = Layer(layer.attn.float(), *wide)
    bound = bound_pass(exact, eight_bits=False, kernel=None, device=device)
    return exact_attention((store_layer(exact, bound), bound.keys, bound.values))


@torch.no_grad()
def measure(name: str, device: torch.device) -> None:
    """Print one shape's lines."""
    shape = SHAPES[name]
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    if load(FLASH3_FP8, device, dtype, shape.head_dim) is None:
        print(f"{name}: {explain(FLASH3_FP8, device, dtype, shape.head_dim)}")
        return
    layer = make_layer(shape, device, dtype)
    variant = RotaryVariant(shape.heads * shape.head_dim, shape.head_dim)
    kernels = {False: ROTARY_STORE.load(device, dtype, variant), True: ROTARY_STORE_FP8.load(device, dtype, variant)}
    compiles = device.type == "cuda"
    made = {}
    for eight_bits, kernel in kernels.items():
        bound = bound_pass(layer, eight_bits=eight_bits, kernel=kernel, device=device)
        times = []
        for part in (store_layer, run_layer):
            call = torch.compile(part, dynamic=False, fullgraph=True) if compiles else part
            times.append(1000 * time_call(lambda call=call, bound=bound: call(layer, bound), device, repeats=25))
        made[eight_bits] = call(layer, bound)
        label = "written in 8 bits" if eight_bits else "quantized in the call"
        print(f"{name:<16}{label:<24}{times[0]:>12.3f}{times[1]:>12.3f}", end="", flush=True)
        if eight_bits:
            _print_differences(layer, bound, device)
        else:
            print(flush=True)
    exact = exact_values(layer, device)
    for eight_bits, values in made.items():
        label = "written in 8 bits" if eight_bits else "quantized in the call"
        print(f"{name:<16}{label:<24}error {relative_error(values, exact):.4f}", flush=True)


def _print_differences(layer: Layer, bound: SelfAttentionPass, device: torch.device) -> None:
    """Between the kernel's keys and values and torch's."""
    plain = bound_pass(layer, eight_bits=True, kernel=None, device=device)
    queries = store_layer(layer, bound), store_layer(layer, plain)
    pairs = (queries, (bound.keys, plain.keys), (bound.values, plain.values))
    differ = [float((one.float() != other.float()).float().mean()) for one, other in pairs]
    print("   differs from torch: " + ", ".join(f"{100 * share:.3f} %" for share in differ), flush=True)


def main(arguments: list[str] | None = None) -> None:
    """Run the program."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto")
    device = device_of(parser.parse_args(arguments).device)
    torch.backends.cuda.matmul.allow_tf32 = False
    on_card = device.type == "cuda"
    print(f"{'shape':<16}{'keys':<24}{'store ms':>12}{'all ms':>12}", flush=True)
    with nullcontext() if on_card else emulated_flash3():
        for name in ("14B", "1.3B", "14B 576x320") if on_card else ("tiny",):
            measure(name, device)


if __name__ == "__main__":
    main()
