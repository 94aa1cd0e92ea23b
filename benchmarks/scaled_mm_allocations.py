"""What `torch._scaled_mm` allocates per call: output, workspace, and whether anything stays.

    python benchmarks/scaled_mm_allocations.py [--tokens 4680] [--json]

Counts the CUDA caching allocator's own statistics around single calls, at the 14B's layer shapes.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass

import torch

SHAPES = ((5120, 5120), (5120, 15360), (5120, 13824), (13824, 5120))


@dataclass(frozen=True)
class CallFigures:
    """Bytes of one call.

    Attributes:
        scaling: "tensor" or "row".
        in_features: of the layer.
        out_features: of the layer.
        output: bytes of the result.
        peak: most bytes requested during the call, above those before it.
        kept: bytes still requested once the result is freed, above those before the call.
        allocations: how many blocks the call requested from the allocator.
        first_call_kept: what the very first call of the process left behind (library workspaces).
    """

    scaling: str
    in_features: int
    out_features: int
    output: int
    peak: int
    kept: int
    allocations: int
    first_call_kept: int


def requested() -> dict[str, int]:
    """The allocator's counters of requested bytes and allocations."""
    stats = torch.cuda.memory_stats()
    return {
        "now": stats["requested_bytes.all.current"],
        "peak": stats["requested_bytes.all.peak"],
        "count": stats["allocation.all.allocated"],
    }


def measure(tokens: int, in_features: int, out_features: int, scaling: str) -> CallFigures:
    """One shape and scaling; the second call is the one counted."""
    device = torch.device("cuda")
    x = torch.randn(tokens, in_features, device=device).to(torch.float8_e4m3fn)
    weight = torch.randn(out_features, in_features, device=device).to(torch.float8_e4m3fn)
    rows, columns = (tokens, out_features) if scaling == "row" else (1, 1)
    scale_a = torch.ones((rows, 1), device=device)
    scale_b = torch.ones((1, columns), device=device)

    def call() -> torch.Tensor:
        return torch._scaled_mm(
            x, weight.t(), scale_a=scale_a, scale_b=scale_b, out_dtype=torch.bfloat16, use_fast_accum=True
        )

    torch.cuda.synchronize()
    before_first = requested()["now"]
    del_me = call()
    output = del_me.untyped_storage().nbytes()
    del del_me
    torch.cuda.synchronize()
    first_kept = requested()["now"] - before_first
    torch.cuda.reset_peak_memory_stats()
    before = requested()
    result = call()
    torch.cuda.synchronize()
    during = requested()
    del result
    after = requested()
    return CallFigures(
        scaling=scaling,
        in_features=in_features,
        out_features=out_features,
        output=output,
        peak=during["peak"] - before["now"],
        kept=after["now"] - before["now"],
        allocations=during["count"] - before["count"],
        first_call_kept=first_kept,
    )


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4680)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 9):
        print("skipped: no CUDA device with FP8 units (compute capability 8.9 or newer) here.")
        return
    figures = [measure(options.tokens, *shape, scaling) for scaling in ("tensor", "row") for shape in SHAPES]
    if options.json:
        print(json.dumps([asdict(item) for item in figures]))
        return
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {options.tokens} tokens; bytes per call")
    columns = ("scaling", "in_features", "out_features", "output", "peak", "kept", "allocations", "first_call_kept")
    print(" ".join(f"{name:>15}" for name in columns))
    for item in figures:
        print(" ".join(f"{getattr(item, name)!s:>15}" for name in columns))


if __name__ == "__main__":
    main()
