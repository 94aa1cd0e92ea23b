"""From a live edit to its first picture, in times of a block, at random moments of a steady stream.

    python benchmarks/edit_to_picture.py --sizes 14B --formats fp8 --compile --text-encoder --edits 25 --json edits.json

Three streams of each model, one behind the other in one run: as it was (whole blocks, edits taken between two blocks),
with pictures shown as they are decoded, and with blocks begun again for an edit that comes early in them. A fourth has
nobody who watches, and says what watching costs. The edit is put into the stream's `LiveControl`, where the server's
route puts it; its picture counts when a page that asks `LiveNews` gets it, and once more when it is a JPEG. Each edit
is a prompt that was not known; with `--text-encoder` the encoder is on the card and encodes it, else its embeddings are
drawn. On a CPU, in a minute: `--sizes tiny --device cpu --resolution 32x32 --steps 24` (the tiny model decodes for as
long as 20 of its passes take).
"""

from __future__ import annotations

import argparse
import json
import time
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from statistics import mean, median
from typing import Any

import streamblocks_path  # noqa: F401
import torch
from compiled_blocks import compiled
from edited_stream import EditedStream, Mode
from floors import device_of
from full_size_models import SIZES
from live_random_pipeline import LiveRandomPipeline
from random_pipeline import PipelineOptions
from weight_formats import FORMATS, layer_replacement

from streamblocks.families.kv_policies import KV_POLICIES, RECOMPUTE
from streamblocks.memory.cleanup import release_cached_memory
from streamblocks.stream.live_block import MOST_DONE
from streamblocks.stream.settings import StreamSettings

from full_size import describe_environment

_UNWATCHED_BLOCKS = 14


def modes(most_done: list[float]) -> list[Mode]:
    """What is compared, in the order in which it runs."""
    again = [Mode(f"begun again up to {share:.2f}", True, share) for share in most_done]
    unwatched = Mode("nobody watches", False, 0.0, is_watched=False)
    return [unwatched, Mode("before", False, 0.0), Mode("as decoded", True, 0.0), *again]


def measure(
    pipeline: LiveRandomPipeline, settings: StreamSettings, mode: Mode, edits: int, seed: int
) -> dict[str, Any]:
    """One stream's figures."""
    edited = EditedStream(mode, pipeline, settings, edits if mode.is_watched else 0, seed)
    edited.run()
    figures: dict[str, Any] = {
        "mode": mode.name,
        "block_ms": 1000 * edited.block_time,
        "steady_blocks": len(edited.block_seconds),
        "begun_again": edited.begun_again,
    }
    if edited.made:
        figures |= {
            "edits": [asdict(one) for one in edited.made],
            "picture": summarise([one.picture for one in edited.made], edited.block_time),
            "jpeg": summarise([one.jpeg for one in edited.made], edited.block_time),
            "same_block": sum(one.waited == 0 for one in edited.made),
        }
    return figures


def summarise(seconds: list[float], block: float) -> dict[str, float]:
    """Times of a block."""
    ordered = sorted(one / block for one in seconds)
    return {
        "mean": mean(ordered),
        "median": median(ordered),
        "p90": ordered[min(len(ordered) - 1, int(0.9 * len(ordered)))],
        "max": ordered[-1],
    }


def table(results: list[dict[str, Any]]) -> str:
    """As Markdown."""
    lines = ["| stream | block ms | edits | same block | mean | median | p90 | max | with JPEG: mean | max |"]
    lines.append("|" + " --- |" * 10)
    for one in results:
        times = ["", "", "", "", "", "", "", ""]
        if "picture" in one:
            shown = [one["picture"][name] for name in ("mean", "median", "p90", "max")]
            shown += [one["jpeg"][name] for name in ("mean", "max")]
            times = [str(len(one["edits"])), str(one["same_block"]), *(f"{value:.2f}" for value in shown)]
        lines.append(f"| {one['mode']} | {one['block_ms']:.1f} | {' | '.join(times)} |")
    return "\n".join(lines)


def run(options: argparse.Namespace, size: str, weight_format: str, report: list[dict[str, Any]]) -> None:
    """Every policy and mode of one model."""
    device = device_of(options.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    began = time.perf_counter()
    made_with = PipelineOptions(device, dtype, text_encoder=options.text_encoder)
    pipeline = LiveRandomPipeline(SIZES[size], made_with, layer_replacement(weight_format, SIZES[size]))
    pipeline.use_backend(options.backend)
    print(f"{size} {weight_format}: built in {time.perf_counter() - began:.0f} s", flush=True)
    width, height = (int(side) for side in options.resolution.split("x"))
    with compiled(pipeline, backend="inductor") if options.compile else nullcontext():
        for policy in options.policies.split(","):
            settings = StreamSettings(
                width=width, height=height, blocks=_UNWATCHED_BLOCKS, steps=options.steps, kv_policy=policy
            )
            case = {"size": size, "format": weight_format, "policy": policy, "resolution": options.resolution}
            results: list[dict[str, Any]] = []
            for mode in modes([float(share) for share in options.until.split(",")]):
                # A stream that is edited is stopped behind its last edit.
                chosen = replace(settings, endless=mode.is_watched)
                results.append(measure(pipeline, chosen, mode, options.edits, options.seed))
                print(json.dumps({name: part for name, part in results[-1].items() if name != "edits"}), flush=True)
                release_cached_memory(device)
            report.append(case | {"environment": describe_environment(device), "streams": results})
            print(f"\n{' '.join(case.values())}, times of a block\n\n{table(results)}\n", flush=True)
            if options.json is not None:
                options.json.parent.mkdir(parents=True, exist_ok=True)
                options.json.write_text(json.dumps(report, indent=1), encoding="utf-8")
    pipeline.release()


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="14B", help=", ".join(SIZES))
    parser.add_argument("--formats", default="bf16", help=", ".join(FORMATS))
    parser.add_argument("--policies", default=RECOMPUTE, help=", ".join(KV_POLICIES))
    parser.add_argument("--resolution", default="832x480")
    parser.add_argument("--backend", default="native")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--text-encoder", action="store_true", help="it is on the device, and encodes each edit")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--edits", type=int, default=25, help="of each stream")
    parser.add_argument("--until", default=f"0.5,{MOST_DONE}", help="shares of a block up to which it is begun again")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    report: list[dict[str, Any]] = []
    for size in options.sizes.split(","):
        for weight_format in options.formats.split(","):
            run(options, size, weight_format, report)
            release_cached_memory(device_of(options.device))
    return report


if __name__ == "__main__":
    main()
