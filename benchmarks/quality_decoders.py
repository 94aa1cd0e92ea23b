"""The part of `quality.py` for decoders: the mini's tiny decoder beside its VAE, on the same latents.

Run it alone by `python benchmarks/quality.py --only decoder`.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import streamblocks_path  # noqa: F401
import torch
from drawn_truth import Hits, compare
from picture_differences import jumps, psnr_of, seam_jumps
from quality_figures import ASPECTS, by_aspect, mean, percent, print_row, share
from quality_streams import StreamJob
from worker_processes import spread_work

from streamblocks.stream.materialise import materialise
from streamblocks.stream.session import Session
from streamblocks.stream.settings import StreamSettings
from streamblocks.tools.train_mini.clips import SIZE
from streamblocks.tools.train_mini.scenes import plain_caption
from streamblocks.tools.train_mini.train_tiny_decoder import FILE, load_tiny_decoder

VAE, TINY = "VAE", "tiny decoder"


@dataclass(frozen=True)
class DecodedOutcome:
    """What one stream's latents show by one decoder.

    Attributes:
        hits: against the scene asked for.
        error: mean squared difference from the VAE's pictures, 0..255 squared.
        inside: mean absolute differences (0..1) between neighbouring pictures of a block.
        seams: the same between the last picture of a block and the first of the next.
    """

    hits: Hits
    error: float
    inside: tuple[float, ...]
    seams: tuple[float, ...]


def measure_decoders(jobs: Sequence[StreamJob], workers: int) -> dict[str, Any]:
    """Make the streams, decode their latents by both decoders, print a table; `jobs` ask for one scene each."""
    outcomes = list(spread_work(decode_by_both, jobs, workers))
    found = {decoder: _figures([outcome[decoder] for outcome in outcomes]) for decoder in (VAE, TINY)}
    print(f"Decoders of the same latents, {len(jobs)} captions, blocks 1 to {len(jobs[0].scenes)}; PSNR against {VAE}")
    print_row("decoder", "PSNR dB", "median clip", *(f"{aspect} %" for aspect in ASPECTS), "all three %", "seam x")
    for decoder, figures in found.items():
        shown = ["" if decoder == VAE else f"{figures[name]:.1f}" for name in ("psnr_db", "median_psnr_db")]
        hits = [outcome[decoder].hits for outcome in outcomes]
        print_row(decoder, *shown, *percent(hits), f"{figures['seam_ratio']:.3f}")
    return {"decoders": found}


def decode_by_both(job: StreamJob) -> dict[str, DecodedOutcome]:
    """Outcomes by decoder of a stream that the VAE feeds its pictures back to."""
    pipeline = materialise(job.recipe())
    settings = StreamSettings(
        width=SIZE, height=SIZE, blocks=len(job.scenes), seed=job.seed, kv_policy=job.policy, kv_format=job.kv_format
    )
    tiny = load_tiny_decoder(Path(job.model) / FILE)
    past = tiny.empty_past()
    pictures: dict[str, list[torch.Tensor]] = {VAE: [], TINY: []}
    with Session(pipeline, settings) as session, torch.no_grad():
        for scene in job.scenes:
            pictures[VAE].append(session.run_block(plain_caption(scene)).frames)
            pictures[TINY].append(as_frames(tiny(session.state.values["latents"].float(), past)))
    return {decoder: _outcome(job, blocks, pictures[VAE]) for decoder, blocks in pictures.items()}


def add_decoder_options(parser: argparse.ArgumentParser) -> None:
    """The options of this part."""
    parser.add_argument("--decoder-captions", type=int, default=72, help="for decoders")


def as_frames(pictures: torch.Tensor) -> torch.Tensor:
    """[1, 3, F, 64, 64], 0..1, to uint8 [F, 64, 64, 3]."""
    return (pictures[0].clamp(0.0, 1.0) * 255.0).round().to(torch.uint8).movedim(0, -1)


def _outcome(job: StreamJob, blocks: Sequence[torch.Tensor], reference: Sequence[torch.Tensor]) -> DecodedOutcome:
    shown = torch.cat(list(blocks))
    return DecodedOutcome(
        hits=compare(shown, job.scenes[0]),
        error=float((shown.float() - torch.cat(list(reference)).float()).square().mean()),
        inside=tuple(jump for block in blocks for jump in jumps(block)),
        seams=seam_jumps(blocks),
    )


def _figures(outcomes: Sequence[DecodedOutcome]) -> dict[str, Any]:
    hits, errors = [outcome.hits for outcome in outcomes], [outcome.error for outcome in outcomes]
    seams = mean([jump for outcome in outcomes for jump in outcome.seams])
    inside = mean([jump for outcome in outcomes for jump in outcome.inside])
    return {
        "psnr_db": psnr_of(mean(errors)) if any(errors) else None,
        "median_psnr_db": psnr_of(statistics.median(errors)) if any(errors) else None,
        "accuracy": by_aspect(hits) | {"all": share(hits, "all")},
        "seam_ratio": seams / inside,
    }
