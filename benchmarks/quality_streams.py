"""Streams of the mini model, made by the real session, and what they show."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace

import streamblocks_path  # noqa: F401
import torch
from drawn_truth import Hits, compare, see
from emulated_flash3 import emulated_flash3
from fp8_activations import rounded_fp8_activations
from picture_differences import jumps, seam_jumps
from weight_formats import PLAIN, SPECS
from worker_processes import spread_work

from streamblocks.families.kv_policies import KV_PLAIN, RECOMPUTE
from streamblocks.ops.attention_backends import FLASH3_BACKENDS
from streamblocks.ops.quantization import QuantizationSpec
from streamblocks.stream.materialise import materialise
from streamblocks.stream.recipe import NATIVE_ATTENTION, Recipe
from streamblocks.stream.session import Session
from streamblocks.stream.settings import StreamSettings
from streamblocks.tools.train_mini.clips import SIZE
from streamblocks.tools.train_mini.scenes import Scene, plain_caption

FLOAT32 = "float32"
# Blocks that are judged as one clip.
WINDOW = 5


@dataclass(frozen=True)
class StreamJob:
    """One stream to make.

    Attributes:
        scenes: what each block is asked to show.
        seed: of its noise; none was used in training.
        model: folder of the pipeline.
        weights: `FLOAT32`, or a name of `weight_formats`, which computes in bfloat16.
        policy: of the KV cache.
        kv_format: of the KV cache.
        keep_frames: also return the frames.
        attention: backend; FlashAttention 3 is emulated, in bfloat16 weights only.
        decoder: file of what decodes in the VAE's place; None: the VAE.
        keep_latents: also return the latents.
    """

    scenes: tuple[Scene, ...]
    seed: int
    model: str
    weights: str = FLOAT32
    policy: str = RECOMPUTE
    kv_format: str = KV_PLAIN
    keep_frames: bool = False
    attention: str = NATIVE_ATTENTION
    decoder: str | None = None
    keep_latents: bool = False

    def recipe(self) -> Recipe:
        """Of the pipeline."""
        if self.weights == FLOAT32:
            return Recipe(self.model, dtype="float32", decoder=self.decoder)
        recipe = Recipe(self.model, dtype="bfloat16", attention_backend=self.attention, decoder=self.decoder)
        if self.weights == PLAIN:
            return recipe
        return replace(recipe, quantization=QuantizationSpec(**SPECS[self.weights]))


@dataclass(frozen=True)
class StreamOutcome:
    """What a stream showed.

    Attributes:
        job: it was made for.
        early: its first five blocks, as one clip, against the scene asked for in the first.
        late: its last five, against the scene asked for in the last.
        colors: seen in each block; None where it shows none.
        inside: mean absolute differences (0..1) between neighbouring pictures of a block.
        seams: the same between the last picture of a block and the first of the next.
        frames: uint8 [pictures, 64, 64, 3]; empty where they were not asked for.
        latents: float32 [1, channels, latent frames, 8, 8]; None where they were not asked for.
    """

    job: StreamJob
    early: Hits
    late: Hits
    colors: tuple[str | None, ...]
    inside: tuple[float, ...]
    seams: tuple[float, ...]
    frames: torch.Tensor
    latents: torch.Tensor | None = None


def make_streams(jobs: Sequence[StreamJob], workers: int) -> Iterator[StreamOutcome]:
    """Outcomes in the order of `jobs`, made by as many processes of one thread each."""
    return spread_work(make_stream, jobs, workers)


def make_stream(job: StreamJob) -> StreamOutcome:
    """Make one stream and look at it."""
    with emulated_flash3() if job.attention in FLASH3_BACKENDS else nullcontext():
        return _make_stream(job)


def _make_stream(job: StreamJob) -> StreamOutcome:
    pipeline = materialise(job.recipe())
    settings = StreamSettings(
        width=SIZE,
        height=SIZE,
        blocks=len(job.scenes),
        seed=job.seed,
        kv_policy=job.policy,
        kv_format=job.kv_format,
    )
    blocks, latents = [], []
    with rounded_fp8_activations(), Session(pipeline, settings) as session:
        for scene in job.scenes:
            blocks.append(session.run_block(plain_caption(scene)).frames)
            latents.append(session.state.values["latents"].float())
    return StreamOutcome(
        job,
        early=compare(torch.cat(blocks[:WINDOW]), job.scenes[0]),
        late=compare(torch.cat(blocks[-WINDOW:]), job.scenes[-1]),
        colors=tuple(see(block).color for block in blocks),
        inside=tuple(jump for block in blocks for jump in jumps(block)),
        seams=seam_jumps(blocks),
        frames=torch.cat(blocks) if job.keep_frames else torch.empty(0, SIZE, SIZE, 3, dtype=torch.uint8),
        latents=torch.cat(latents, dim=2) if job.keep_latents else None,
    )
