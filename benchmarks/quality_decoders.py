"""The part of `quality.py` for decoders: the mini's tiny decoder beside its VAE.

Run it alone by `python benchmarks/quality.py --only decoder`.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import streamblocks_path  # noqa: F401
import torch
from drawn_truth import compare
from picture_differences import jumps, psnr_of, seam_jumps
from quality_figures import ASPECTS, by_aspect, mean, percent, print_row, share, squared_errors
from quality_streams import StreamJob, StreamOutcome, make_streams

from streamblocks.tools.train_mini.train_tiny_decoder import FILE
from streamblocks.wan.checkpoints.components import decoder_component
from streamblocks.wan.steps.host_pictures import to_uint8_pictures
from streamblocks.wan.vae.tiny_decoder import TinyDecoder

# The stream's pictures, which its context is made from, are the VAE's in the first two rows.
VAE, SAME_LATENTS, TINY = "VAE", "same latents", "tiny decoder"
_BLOCK = 3


def measure_decoders(jobs: Sequence[StreamJob], workers: int) -> dict[str, Any]:
    """Make the streams by the VAE and by the tiny decoder, and the pictures of the former's latents by the latter.

    Args:
        jobs: that ask for one scene each.
        workers: processes.
    """
    file = str(Path(jobs[0].model) / FILE)
    kept = [replace(job, keep_frames=True, keep_latents=True) for job in jobs]
    by_vae = list(make_streams(kept, workers))
    in_its_place = [replace(job, decoder=file) for job in kept]
    by_tiny = list(make_streams(in_its_place, workers))
    decoder = cast(TinyDecoder, decoder_component(Path(file), dtype=torch.float32).load(torch.device("cpu")))
    outcomes = {VAE: by_vae, SAME_LATENTS: [decoded_again(one, decoder) for one in by_vae], TINY: by_tiny}
    found = {name: _figures(shown, by_vae) for name, shown in outcomes.items()}
    print(f"Decoders, {len(jobs)} captions, blocks 1 to {len(jobs[0].scenes)}; PSNR against the {VAE}")
    print_row("decoder", "PSNR dB", "median clip", *(f"{aspect} %" for aspect in ASPECTS), "all three %", "seam x")
    for name, shown in outcomes.items():
        decibels = ["" if name == VAE else f"{found[name][figure]:.1f}" for figure in ("psnr_db", "median_psnr_db")]
        print_row(name, *decibels, *percent([one.early for one in shown]), f"{found[name]['seam_ratio']:.3f}")
    return {"decoders": found}


@torch.no_grad()
def decoded_again(outcome: StreamOutcome, decoder: TinyDecoder) -> StreamOutcome:
    """The same stream's latents by another decoder."""
    if outcome.latents is None:
        raise ValueError("the stream's latents were not kept: set keep_latents.")
    past = decoder.empty_past()
    blocks = [to_uint8_pictures(decoder(block, past) * 2.0 - 1.0)[0] for block in outcome.latents.split(_BLOCK, dim=2)]
    return replace(
        outcome,
        early=compare(torch.cat(blocks), outcome.job.scenes[0]),
        inside=tuple(jump for block in blocks for jump in jumps(block)),
        seams=seam_jumps(blocks),
        frames=torch.cat(blocks),
    )


def add_decoder_options(parser: argparse.ArgumentParser) -> None:
    """The options of this part."""
    parser.add_argument("--decoder-captions", type=int, default=36, help="for decoders")


def _figures(outcomes: Sequence[StreamOutcome], reference: Sequence[StreamOutcome]) -> dict[str, Any]:
    hits, errors = [outcome.early for outcome in outcomes], squared_errors(reference, outcomes)
    seams = mean([jump for outcome in outcomes for jump in outcome.seams])
    inside = mean([jump for outcome in outcomes for jump in outcome.inside])
    return {
        "psnr_db": psnr_of(mean(errors)) if any(errors) else None,
        "median_psnr_db": psnr_of(statistics.median(errors)) if any(errors) else None,
        "accuracy": by_aspect(hits) | {"all": share(hits, "all")},
        "seam_ratio": seams / inside,
    }
