"""How far 8-bit attention is from float32 on the mini model's own queries, keys and values.

    python benchmarks/attention_error.py --captions 4 --blocks 5

Self-attention's inputs are taken from streams in bfloat16; FlashAttention 3 is emulated (`emulated_flash3.py`). Errors
are |made - exact| / |exact| over a call, exact in float32 from the same bfloat16 inputs: median, and largest. "fixed
scales" are those of a cache in 8 bits (`wan/transformer/head_scaled_kv_cache.py`): of the layer's last pass without a
past, with their margin.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import streamblocks_path  # noqa: F401
import torch
from emulated_flash3 import emulated_flash3
from quality_figures import spread
from quality_streams import StreamJob, make_stream
from torch.nn import functional as F
from weight_formats import PLAIN

from streamblocks.ops.attention_backends import FLASH3, FLASH3_FP8, FLASH3_FP8_SMOOTH
from streamblocks.ops.flash3 import flash3
from streamblocks.ops.head_quantization import HeadScales, round_heads, scale_with_margin
from streamblocks.ops.library_attention import attend
from streamblocks.tools.train_mini.scenes import all_scenes
from streamblocks.wan.transformer import attention

from quality import MINI

_FIXED = "fixed scales"
_KINDS = (FLASH3, FLASH3_FP8, FLASH3_FP8_SMOOTH, _FIXED)
_FIRST_SEED = 1_030_000


@contextmanager
def measured_errors(every: int) -> Iterator[dict[str, list[float]]]:
    """Inside, each kind's error of one in so many calls of self-attention, by kind."""
    errors: dict[str, list[float]] = {kind: [] for kind in _KINDS}
    calls = 0
    fixed: dict[Any, HeadScales] = {}
    layer: Any = None
    past = 0
    dispatch, store = attention.dispatch_attention_fn, attention.store_block

    def remember(attn: Any, projections: Any, rotary_emb: Any, bound: Any) -> torch.Tensor:  # noqa: ANN401
        nonlocal layer, past
        layer, past = attn, bound.past
        return store(attn, projections, rotary_emb, bound)

    def measure(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **options: Any) -> torch.Tensor:  # noqa: ANN401
        nonlocal calls
        # The estimate of memory runs without data.
        calls += not query.is_meta
        if not query.is_meta and not past:
            fixed[layer] = HeadScales(scale_with_margin(query), scale_with_margin(key), scale_with_margin(value))
        if not query.is_meta and calls % every == 0:
            by_head = [part.float().transpose(1, 2) for part in (query, key, value)]
            exact = F.scaled_dot_product_attention(by_head[0], by_head[1], by_head[2]).transpose(1, 2)
            for kind in _KINDS:
                parts = query, key, value
                made = (_attend_fixed(fixed[layer], *parts) if kind == _FIXED else attend(kind, *parts)).float()
                errors[kind].append(float((made - exact).norm() / exact.norm()))
        attended: torch.Tensor = dispatch(query, key, value, **options)
        return attended

    patched = patch.multiple(attention, dispatch_attention_fn=measure, store_block=remember)
    with emulated_flash3(), patched:
        yield errors


def _attend_fixed(scales: HeadScales, *parts: torch.Tensor) -> torch.Tensor:
    rounded = (round_heads(part, scale) for part, scale in zip(parts, scales, strict=True))
    return flash3(*rounded, *scales)


def main(arguments: list[str] | None = None) -> None:
    """Run the program."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--captions", type=int, default=4)
    parser.add_argument("--blocks", type=int, default=5)
    parser.add_argument("--every", type=int, default=7, help="of so many calls, one is measured")
    options = parser.parse_args(arguments)
    with measured_errors(options.every) as errors:
        for number, scene in enumerate(spread(all_scenes(), options.captions)):
            make_stream(StreamJob((scene,) * options.blocks, _FIRST_SEED + number, str(MINI), PLAIN))
    print(f"{'kind':<22}{'calls':>8}{'median':>10}{'95 %':>10}{'largest':>10}")
    for kind, found in errors.items():
        late = statistics.quantiles(found, n=20)[-1]
        print(f"{kind:<22}{len(found):>8}{statistics.median(found):>10.4f}{late:>10.4f}{max(found):>10.4f}")


if __name__ == "__main__":
    main()
