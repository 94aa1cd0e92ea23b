"""Self-attention at the models' shapes on one card: time and error of each kind, in one run, with a table.

    python benchmarks/attention_kinds.py                       # all shapes and kinds; under a minute on an H200
    python benchmarks/attention_kinds.py --shapes 14B --json kinds.json
    python benchmarks/attention_kinds.py --device cpu --shapes tiny   # what runs on a CPU: native alone

Times are medians of CUDA events, and for FlashAttention 3 in 8 bits they include the quantization of queries, keys and
values, compiled as in a stream; "of which" gives parts. Errors are |made - exact| / |exact| against float32 over two
heads, for Gaussian numbers, and for keys of which each channel has a constant of three times their spread.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import streamblocks_path  # noqa: F401
import torch
from device_rates import AttentionShape, time_call
from diffusers.models.attention_dispatch import AttentionBackendName, dispatch_attention_fn
from floors import device_of

from streamblocks.memory.json_text import json_text
from streamblocks.ops.attention_backends import COMFY_INT8, FLASH3, FLASH3_FP8, FLASH3_FP8_SMOOTH
from streamblocks.ops.flash3 import flash3
from streamblocks.ops.fp8_linear import FP8_DTYPE, FP8_MAX
from streamblocks.ops.head_quantization import quantize_heads, smooth_keys
from streamblocks.ops.library_attention import attend, explain, load

SHAPES = {
    "14B": AttentionShape(4680, 9360, 40, 128),
    "1.3B window 21": AttentionShape(4680, 32760, 12, 128),
    "14B 576x320": AttentionShape(2160, 4320, 40, 128),
    "1.3B": AttentionShape(4680, 9360, 12, 128),
    "tiny": AttentionShape(96, 192, 2, 64),
}
# Of these shapes every part is measured; each is compiled on its own, which takes seconds.
_WHOLE = ("14B", "1.3B window 21")
_COMPARED_HEADS = 2
_OFFSET = 3.0
Tokens = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


class Kind(NamedTuple):
    """One way to compute attention, or a part of it.

    Attributes:
        name: in the table.
        library: what it needs of `library_attention`; None for nothing.
        attends: of query, key and value, each [1, tokens, heads, 128].
        compiles: as a compiled layer does.
        prepares: what is done before the time is taken, such as quantizing.
        is_part: gives no values to compare.
        everywhere: at every shape.
    """

    name: str
    library: str | None
    attends: Callable[..., Any]
    compiles: bool = False
    prepares: Callable[..., tuple[Any, ...]] | None = None
    is_part: bool = False
    everywhere: bool = True


def _dispatch(backend: str) -> Callable[..., torch.Tensor]:
    name = AttentionBackendName(backend)
    return lambda query, key, value: dispatch_attention_fn(query, key, value, backend=name)


def _of(library: str) -> Callable[..., torch.Tensor]:
    return lambda query, key, value: attend(library, query, key, value)


def _quantize(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, ...]:
    (query, q), (key, k), (value, v) = quantize_heads(query), quantize_heads(key), quantize_heads(value)
    return query, key, value, q, k, v


def _quantize_smooth(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return _quantize(query, smooth_keys(key), value)


def _cast(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """All scales 1: e4m3fn's own range, one pass without a search for the largest."""
    ones = torch.ones(query.shape[0], query.shape[2], device=query.device)
    cast = (part.clamp(-FP8_MAX, FP8_MAX).to(FP8_DTYPE) for part in (query, key, value))
    return flash3(*cast, ones, ones, ones)


KINDS = (
    Kind("native", None, _dispatch("native")),
    Kind("cuDNN BF16", None, _dispatch("_native_cudnn"), everywhere=False),
    Kind("FA3 BF16", FLASH3, _of(FLASH3)),
    Kind("FA3 FP8", FLASH3_FP8, _of(FLASH3_FP8), compiles=True),
    Kind("  of which attention", FLASH3_FP8, flash3, prepares=_quantize, is_part=True),
    Kind("  of which quantizing", FLASH3_FP8, _quantize, compiles=True, is_part=True, everywhere=False),
    Kind("FA3 FP8 smooth keys", FLASH3_FP8_SMOOTH, _of(FLASH3_FP8_SMOOTH), compiles=True, everywhere=False),
    Kind("  of which quantizing", FLASH3_FP8, _quantize_smooth, compiles=True, is_part=True, everywhere=False),
    Kind("FA3 FP8, scales of 1", FLASH3_FP8, _cast, compiles=True, everywhere=False),
    Kind("comfy-kitchen INT8", COMFY_INT8, _of(COMFY_INT8)),
)


def draw(shape: AttentionShape, device: torch.device, offset: float = 0.0) -> Tokens:
    """Random query, key and value; keys with a constant per channel of `offset` times their spread."""
    drawn = torch.Generator(device).manual_seed(0)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32

    def tokens(count: int) -> torch.Tensor:
        return torch.randn((1, count, shape.heads, shape.head_dim), device=device, generator=drawn)

    query, key, value = tokens(shape.queries), tokens(shape.keys), tokens(shape.keys)
    key += offset * tokens(1)
    return query.to(dtype), key.to(dtype), value.to(dtype)


def exact_attention(tokens: Tokens) -> torch.Tensor:
    """float32, the first heads only: [1, queries, heads, head_dim]."""
    query, key, value = (part[:, :, :_COMPARED_HEADS].float().transpose(1, 2) for part in tokens)
    scores = query @ key.transpose(2, 3) * query.shape[-1] ** -0.5
    return (scores.softmax(dim=-1) @ value).transpose(1, 2)


def relative_error(made: torch.Tensor, exact: torch.Tensor) -> float:
    """|made - exact| / |exact| over the heads that were compared."""
    return float((made[:, :, :_COMPARED_HEADS].float() - exact).norm() / exact.norm())


@torch.no_grad()
def measure_shape(name: str, device: torch.device, deadline: float) -> Iterator[dict[str, Any]]:
    """A row of the table for each kind, as soon as it is measured."""
    shape = SHAPES[name]
    tokens = {offset: draw(shape, device, offset) for offset in (0.0, _OFFSET)}
    exact = {offset: exact_attention(each) for offset, each in tokens.items()}
    for kind in KINDS:
        row = {"shape": name, "kind": kind.name}
        if not kind.everywhere and name not in _WHOLE:
            continue
        if time.monotonic() > deadline:
            yield {**row, "failed": "out of time"}
            continue
        try:
            yield {**row, **_measure(kind, shape, tokens, exact, device)}
        except Exception as error:
            yield {**row, "failed": f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"}


def _measure(
    kind: Kind,
    shape: AttentionShape,
    tokens: dict[float, Tokens],
    exact: dict[float, torch.Tensor],
    device: torch.device,
) -> dict[str, Any]:
    if kind.library is not None:
        like = device, tokens[0.0][0].dtype, shape.head_dim
        if load(kind.library, *like) is None:
            return {"failed": explain(kind.library, *like)}
    call = torch.compile(kind.attends, dynamic=False) if kind.compiles else kind.attends
    given = {offset: each if kind.prepares is None else kind.prepares(*each) for offset, each in tokens.items()}
    seconds = time_call(lambda: call(*given[0.0]), device, repeats=25)
    operations = 4.0 * shape.queries * shape.keys * shape.heads * shape.head_dim
    row = {"ms": 1000.0 * seconds, "tera_per_second": operations / seconds / 1e12}
    if not kind.is_part:
        row |= {f"error_{offset:g}": relative_error(call(*given[offset]), exact[offset]) for offset in given}
    return row


def print_row(row: dict[str, Any]) -> None:
    """One line of the table."""
    start = f"{row['shape']:<16}{row['kind']:<24}"
    if "failed" in row:
        print(f"{start}{row['failed']}", flush=True)
        return
    errors = "".join(f"{row[name]:>12.4f}" for name in ("error_0", f"error_{_OFFSET:g}") if name in row)
    print(f"{start}{row['ms']:>9.3f}{row['tera_per_second']:>10.0f}{errors}", flush=True)


def main(arguments: list[str] | None = None) -> None:
    """Run the program."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [name for name in SHAPES if name != "tiny"]
    parser.add_argument("--shapes", type=lambda text: text.split(","), default=names, help=", ".join(SHAPES))
    parser.add_argument("--device", default="auto")
    parser.add_argument("--json", type=Path, help="file for the rows")
    parser.add_argument("--time-budget", type=float, default=55.0, help="seconds; then nothing new starts")
    options = parser.parse_args(arguments)
    wrong = [name for name in options.shapes if name not in SHAPES]
    if wrong:
        parser.error(f"--shapes has {wrong[0]!r}: choose from {', '.join(SHAPES)}.")
    device, deadline = device_of(options.device), time.monotonic() + options.time_budget
    torch.backends.cuda.matmul.allow_tf32 = False
    print(f"{torch.cuda.get_device_name(device) if device.type == 'cuda' else device}, torch {torch.__version__}")
    print(f"{'shape':<16}{'kind':<24}{'ms':>9}{'TFLOP/s':>10}{'error':>12}{'with offset':>12}", flush=True)
    rows = []
    for name in options.shapes:
        for row in measure_shape(name, device, deadline):
            print_row(row)
            rows.append(row)
    if options.json is not None:
        options.json.write_text(json_text(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
