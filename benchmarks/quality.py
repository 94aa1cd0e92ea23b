"""Does the mini model's stream show what the prompt says, for how long, and what does quantizing cost?

    python benchmarks/quality.py                     # all parts; about half an hour on 2 cores
    python benchmarks/quality.py --only prompts,formats --captions 24 --json quality.json --sheets output/quality
    python benchmarks/quality.py --direct --json     # only directed streams (`quality_direct.py`), as one JSON object

The streams are made by the session that the nodes use. What their frames show is measured from the pixels, by comparing
with drawings (`drawn_truth.py`). A clip's colour, shape and direction are those of most of its
pictures; clips are five blocks long. No seed was used in training.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import streamblocks_path
from picture_differences import psnr_of
from quality_decoders import add_decoder_options, measure_decoders
from quality_direct import add_direct_options, measure_direct
from quality_figures import ASPECTS, by_aspect, mean, percent, print_row, share, spread, squared_errors
from quality_sheets import write_sheet
from quality_streams import FLOAT32, WINDOW, StreamJob, StreamOutcome, make_streams
from weight_formats import FORMATS, PLAIN

from streamblocks.families.kv_policies import KV_FP8, KV_INT8, KV_PLAIN, KV_POLICIES
from streamblocks.memory.json_text import json_text
from streamblocks.ops.attention_backends import FLASH3_BACKENDS, FLASH3_FP8, FLASH3_FP8_SMOOTH
from streamblocks.stream.recipe import NATIVE_ATTENTION
from streamblocks.stream.settings import StreamSettings
from streamblocks.tools.train_mini.scenes import COLORS, Scene, all_scenes

PARTS = ("prompts", "long", "changes", "formats", "decoder")
MINI = streamblocks_path.ROOT / "models" / "mini"
_FIRST_SEED = 1_000_000
_BLOCKS_BEFORE_CHANGE, _BLOCKS_BEHIND_CHANGE = 3, 4
_ON_SHEET = 12
# For the file of the figures: print them instead.
_PRINT = Path("-")
# Slow accumulation exists on FP8 units only.
# Formats of this program: weights in bfloat16, keys and values of the past in 8 bits.
KV_IN_8_BITS = {"kv-fp8": KV_FP8, "kv-int8": KV_INT8}
# Weights in bfloat16, self-attention in 8 bits as FlashAttention 3 computes it.
ATTENTION_IN_8_BITS = {"attention-fp8": FLASH3_FP8, "attention-fp8-smooth": FLASH3_FP8_SMOOTH}
ALL_FORMATS = (*FORMATS, *KV_IN_8_BITS, *ATTENTION_IN_8_BITS)
_SHOWN_FORMATS = tuple(name for name in ALL_FORMATS if name != "fp8-slow")


@dataclass
class Quality:
    """One run: what was asked for, and the figures so far."""

    options: argparse.Namespace
    figures: dict[str, Any] = field(default_factory=dict)

    def run(self) -> None:
        """Every part asked for; its figures are written as soon as they are there."""
        parts: dict[str, Callable[[], None]] = {
            "prompts": self.measure_prompts,
            "long": self.measure_long_streams,
            "changes": self.measure_prompt_changes,
            "formats": self.measure_formats,
            "decoder": self.measure_decoder,
            "direct": self.measure_directed_streams,
        }
        for name in (*self.options.only, *["direct"] * self.options.direct):
            began = time.perf_counter()
            parts[name]()
            print(f"({name}: {(time.perf_counter() - began) / 60:.1f} min)\n", flush=True)
            if self.options.json not in (None, _PRINT):
                self.options.json.write_text(json_text(self.figures, indent=1) + "\n")

    def measure_prompts(self) -> None:
        """(a) Accuracy over captions and held-out seeds."""
        scenes = spread(all_scenes(), self.options.captions)
        jobs = [
            self._job((scene,) * WINDOW, caption * self.options.seeds + seed)
            for caption, scene in enumerate(scenes)
            for seed in range(self.options.seeds)
        ]
        outcomes = self._make(jobs, "prompts")
        hits = [outcome.early for outcome in outcomes]
        self.figures |= {f"{aspect}_accuracy": share(hits, aspect) for aspect in ASPECTS}
        self.figures |= {"all_accuracy": share(hits, "all"), "clips": len(hits)}
        print(f"Prompt accuracy, {len(scenes)} captions x {self.options.seeds} seeds, blocks 1 to {WINDOW}")
        print_row("", *(f"{aspect} %" for aspect in ASPECTS), "all three %")
        print_row("", *percent(hits))

    def measure_long_streams(self) -> None:
        """(b) Early against late blocks, and (c) jumps at seams, for each KV policy."""
        blocks, scenes = self.options.blocks, spread(all_scenes(), self.options.long_captions)
        kept, weights = self.options.kv_format, self.options.attention
        attention = {} if weights is None else {"weights": PLAIN, "attention": weights}
        print(f"Streams of {blocks} blocks, {len(scenes)} captions, KV in {kept}, attention {weights or 'in float32'}:")
        print(f"first and last {WINDOW}; seams")
        print_row(
            "policy", *(f"{aspect} %" for aspect in ASPECTS), "late:", *(f"{name} %" for name in ASPECTS), "seam x"
        )
        late, early, ratios = {}, {}, {}
        for policy in self.options.policies:
            jobs = [
                replace(self._job((scene,) * blocks, 5_000 + i, policy=policy), kv_format=kept, **attention)
                for i, scene in enumerate(scenes)
            ]
            outcomes = self._make(jobs, f"long_{policy}")
            first, last = [outcome.early for outcome in outcomes], [outcome.late for outcome in outcomes]
            ratios[policy] = mean([x for o in outcomes for x in o.seams]) / mean(
                [x for o in outcomes for x in o.inside]
            )
            early[policy], late[policy] = by_aspect(first), by_aspect(last)
            print_row(policy, *percent(first)[:3], "", *percent(last)[:3], f"{ratios[policy]:.3f}")
        for aspect in ASPECTS:
            self.figures[f"early_{aspect}_accuracy"] = {policy: figures[aspect] for policy, figures in early.items()}
            self.figures[f"late_{aspect}_accuracy"] = {policy: figures[aspect] for policy, figures in late.items()}
        self.figures["seam_ratio_by_policy"] = ratios
        self.figures["seam_ratio"] = ratios.get(StreamSettings().kv_policy)

    def measure_prompt_changes(self) -> None:
        """(d) Blocks until the colour of a new prompt shows; 1 is the first block made with it."""
        scenes = spread(all_scenes(), self.options.change_captions)
        colors = list(COLORS)
        counts: list[int | None] = []
        jobs = []
        for number, scene in enumerate(scenes):
            step = 1 + number % (len(colors) - 1)
            other = replace(scene, color=colors[(colors.index(scene.color) + step) % len(colors)])
            plan = (scene,) * _BLOCKS_BEFORE_CHANGE + (other,) * _BLOCKS_BEHIND_CHANGE
            jobs.append(self._job(plan, 10_000 + number))
        for outcome in self._make(jobs, "changes"):
            wanted = outcome.job.scenes[-1].color
            behind = outcome.colors[_BLOCKS_BEFORE_CHANGE:]
            counts.append(behind.index(wanted) + 1 if wanted in behind else None)
        shown = [count for count in counts if count is not None]
        within = sum(count <= 2 for count in shown) / len(counts)
        self.figures |= {"blocks_to_new_color": mean(shown), "new_color_within_2_blocks": within}
        self.figures["new_color_not_shown"] = len(counts) - len(shown)
        print(f"Prompt changes, {len(counts)} cases: new colour within 2 blocks in {100 * within:.1f} %; by block:")
        print_row(*(f"{block}: {counts.count(block)}" for block in range(1, _BLOCKS_BEHIND_CHANGE + 1)), "never:")
        print_row("", "", "", "", counts.count(None))

    def measure_formats(self) -> None:
        """(e) The formats against bfloat16: the same seeds, so the same streams but for rounding.

        float32 is included because it shows the effect of bfloat16's own rounding: a difference without quantization.
        """
        scenes = spread(all_scenes(), self.options.format_captions)
        psnr, median, accuracy, aspects = {}, {}, {}, {}
        reference: list[StreamOutcome] = []
        print(f"Formats, {len(scenes)} captions, blocks 1 to {WINDOW}; PSNR against {PLAIN}")
        print_row("format", "PSNR dB", "median clip", *(f"{aspect} %" for aspect in ASPECTS), "all three %")
        for weights in (PLAIN, FLOAT32, *(name for name in self.options.formats if name != PLAIN)):
            kept = KV_IN_8_BITS.get(weights)
            stored = {"weights": weights} if kept is None else {"weights": PLAIN, "kv_format": kept}
            if weights in ATTENTION_IN_8_BITS:
                stored = {"weights": PLAIN, "attention": ATTENTION_IN_8_BITS[weights]}
            jobs = [
                replace(self._job((scene,) * WINDOW, 20_000 + i), **stored, keep_frames=True)
                for i, scene in enumerate(scenes)
            ]
            outcomes = self._make(jobs, f"format_{weights}")
            reference = reference or outcomes
            hits = [outcome.early for outcome in outcomes]
            errors = squared_errors(reference, outcomes)
            same = weights == PLAIN
            psnr[weights] = None if same else psnr_of(mean(errors))
            median[weights] = None if same else psnr_of(statistics.median(errors))
            accuracy[weights], aspects[weights] = share(hits, "all"), by_aspect(hits)
            shown = ["" if db is None else f"{db:.1f}" for db in (psnr[weights], median[weights])]
            print_row(weights, *shown, *percent(hits))
        self.figures |= {"psnr_db": psnr, "median_psnr_db": median}
        self.figures |= {"accuracy": accuracy, "accuracy_by_aspect": aspects}

    def measure_decoder(self) -> None:
        """(f) The tiny decoder beside the VAE."""
        scenes = spread(all_scenes(), self.options.decoder_captions)
        jobs = [self._job((scene,) * WINDOW, 30_000 + number) for number, scene in enumerate(scenes)]
        self.figures |= measure_decoders(jobs, self.options.workers)

    def measure_directed_streams(self) -> None:
        """(g) Prompt tracks, start images, video to video, and streams that go on."""
        self.figures |= measure_direct(self.options)

    def _job(self, scenes: Sequence[Scene], seed: int, *, policy: str = StreamSettings().kv_policy) -> StreamJob:
        return StreamJob(tuple(scenes), _FIRST_SEED + seed, str(self.options.model), FLOAT32, policy)

    def _make(self, jobs: Sequence[StreamJob], sheet: str) -> list[StreamOutcome]:
        """Make the streams; with a folder for sheets, keep and write the frames of some."""
        if self.options.sheets:
            shown = set(spread(range(len(jobs)), _ON_SHEET))
            jobs = [replace(job, keep_frames=job.keep_frames or number in shown) for number, job in enumerate(jobs)]
        outcomes = list(make_streams(jobs, self.options.workers))
        if self.options.sheets:
            kept = [outcome for outcome in outcomes if len(outcome.frames)]
            write_sheet(spread(kept, _ON_SHEET), self.options.sheets / f"{sheet}.png")
        return outcomes


def parse_options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    names = lambda text: tuple(text.split(","))  # noqa: E731
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", type=lambda text: Path(text).absolute(), default=MINI, help="pipeline folder; default models/mini"
    )
    parser.add_argument("--only", type=names, help=f"{', '.join(PARTS)}; default: all, none with --direct")
    parser.add_argument("--captions", type=int, default=144, help="of the 144, for prompt accuracy")
    parser.add_argument("--seeds", type=int, default=1, help="per caption, for prompt accuracy")
    parser.add_argument("--blocks", type=int, default=50, help="of a long stream")
    parser.add_argument("--long-captions", type=int, default=24, help="for long streams")
    parser.add_argument("--change-captions", type=int, default=48, help="for prompt changes")
    parser.add_argument("--format-captions", type=int, default=72, help="for formats")
    parser.add_argument("--policies", type=names, default=KV_POLICIES, help=", ".join(KV_POLICIES))
    parser.add_argument("--formats", type=names, default=_SHOWN_FORMATS, help=", ".join(ALL_FORMATS))
    parser.add_argument("--kv-format", choices=(KV_PLAIN, KV_FP8, KV_INT8), default=KV_PLAIN, help="of long streams")
    parser.add_argument(
        "--attention", choices=(NATIVE_ATTENTION, *FLASH3_BACKENDS), help="of long streams, which are then in bfloat16"
    )
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes; default: CPU cores")
    parser.add_argument(
        "--json",
        type=Path,
        nargs="?",
        const=_PRINT,
        metavar="FILE",
        help="file for the figures; without a file they are all that is printed, tables go to the standard error",
    )
    parser.add_argument("--sheets", type=Path, help="folder for contact sheets")
    add_decoder_options(parser)
    add_direct_options(parser)
    options = parser.parse_args(arguments)
    if options.only is None:
        options.only = () if options.direct else PARTS
    for name, allowed in (("only", PARTS), ("policies", KV_POLICIES), ("formats", ALL_FORMATS)):
        wrong = [value for value in getattr(options, name) if value not in allowed]
        if wrong:
            parser.error(f"--{name} has {wrong[0]!r}: choose from {', '.join(allowed)}.")
    if not options.model.is_dir():
        parser.error(f"--model is {str(options.model)!r}, which is not a folder: give a pipeline in diffusers' layout.")
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the program."""
    quality = Quality(parse_options(arguments))
    printed = quality.options.json == _PRINT
    with contextlib.redirect_stdout(sys.stderr) if printed else contextlib.nullcontext():
        quality.run()
    if printed:
        print(json_text(quality.figures))


if __name__ == "__main__":
    main()
