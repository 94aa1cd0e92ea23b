"""A tiny decoder for the mini pipeline: it learns the pictures that the pipeline's own VAE makes of latents.

    python -m streamblocks.tools.train_mini.train_tiny_decoder output/train_tiny_decoder models/mini

On one CPU core this takes about eight minutes; after an interruption the same command resumes. What the pipeline's
folder gets is `tiny_decoder/tiny_decoder.safetensors`, float16, under the names of the makers of such decoders, with
its losses beside it in `losses.json`. diffusers does not look there, as `model_index.json` does not name it.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from ...wan.checkpoints.tiny_decoder_file import LATENTS_FIELD, NORMALIZED
from ...wan.vae.tiny_decoder import TinyDecoder, TinyDecoderConfig
from .checkpoint import TrainingState, save_whole, step_generator
from .clips import SIZE
from .decoded_pool import CLIP_FRAMES, STREAM_BLOCKS, DecodedStream, make_decoded_pool
from .latent_pool import BLOCK_FRAMES
from .mini_models import LATENT_CHANNELS, STORED_DTYPE
from .train_options import TrainOptions, autocast, learning_rate_at
from .train_vae import weighted_error
from .training_loop import Stage, follow_gradient, run_stage

WIDTHS = (32, 16, 16, 16)
FILE = "tiny_decoder/tiny_decoder.safetensors"
PEAK_RATE = 2e-3
AVERAGE_DECAY = 0.99
CHECKPOINT = "tiny_decoder_state.safetensors"
_SCALE = 8
_CELLS = SIZE // _SCALE


@dataclass(frozen=True)
class TinyOptions:
    """The settings of a run.

    Attributes:
        pipeline: folder of the mini pipeline, whose VAE is the teacher; it gets the file.
        clips: drawn clips in the pool.
        streams: streams of the transformer in the pool.
        steps: of the training.
    """

    pipeline: Path
    clips: int = 256
    streams: int = 40
    steps: int = 2000


@dataclass(frozen=True)
class Lesson:
    """What one part of the training uses; every part takes as many pixels per step.

    Attributes:
        until: progress at which the part ends.
        cells: side of the square cut out of each stream, in latents.
        frames: latent frames, from the stream's first on.
        batch: streams per step.
    """

    until: float
    cells: int
    frames: int
    batch: int


# Small windows first, which show the most edges for the time. A decoder must also know the borders of a picture, and a
# stream that has gone on for longer than it looks back.
LESSONS = (
    Lesson(0.30, _CELLS // 2, BLOCK_FRAMES, 16),
    Lesson(0.70, _CELLS // 2, CLIP_FRAMES, 8),
    Lesson(0.85, _CELLS, CLIP_FRAMES, 2),
    Lesson(1.00, _CELLS, STREAM_BLOCKS * BLOCK_FRAMES, 1),
)


def train_tiny_decoder(options: TrainOptions, tiny: TinyOptions) -> tuple[TinyDecoder, list[tuple[int, float]]]:
    """Train, or resume training; returns the averaged decoder and its losses."""
    pool = make_decoded_pool(tiny.pipeline, options.folder, clips=tiny.clips, streams=tiny.streams, seed=options.seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(options.seed)
        decoder = TinyDecoder(TinyDecoderConfig(latent_channels=LATENT_CHANNELS, widths=WIDTHS))
    decoder.to(options.device)
    for parameter in decoder.parameters():
        if parameter.dim() == 4:
            # Twice as fast on a CPU.
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
    state = TrainingState.start(decoder, learning_rate=PEAK_RATE, weight_decay=0.0)
    stage = Stage("tiny decoder", "mean absolute error", tiny.steps, AVERAGE_DECAY, CHECKPOINT)
    run_stage(stage, state, options, lambda: _make_step(state, options, tiny, decoder, pool))
    return decoder.eval().requires_grad_(False), state.losses


def export_tiny_decoder(decoder: TinyDecoder, losses: list[tuple[int, float]], pipeline: Path) -> Path:
    """Write the decoder, float16, into a pipeline's folder, and its losses beside it; returns the file."""
    target = pipeline / FILE
    tensors = {name: tensor.to("cpu", STORED_DTYPE) for name, tensor in decoder.state_dict().items()}
    save_whole(target, tensors, {LATENTS_FIELD: NORMALIZED})
    target.with_name("losses.json").write_text(json.dumps(losses))
    return target


def _make_step(
    state: TrainingState, options: TrainOptions, tiny: TinyOptions, decoder: TinyDecoder, pool: list[DecodedStream]
) -> torch.Tensor:
    generator = step_generator(options.seed, "tiny decoder", state.step)
    lesson = next(lesson for lesson in LESSONS if state.step < lesson.until * tiny.steps)
    windows = [_draw_window(lesson, pool, generator) for _ in range(lesson.batch)]
    latents = torch.stack([window.latents for window in windows]).to(options.device)
    pictures = torch.stack([window.pictures for window in windows]).to(options.device).float() / 127.5 - 1.0
    with autocast(options.device):
        made = decoder(latents).float() * 2.0 - 1.0
    loss = weighted_error(made, pictures)
    follow_gradient(state, loss, learning_rate=learning_rate_at(state.step, tiny.steps, PEAK_RATE))
    return (made.detach() - pictures).abs().mean()


def _draw_window(lesson: Lesson, pool: list[DecodedStream], generator: torch.Generator) -> DecodedStream:
    """A square of the first `lesson.frames` latent frames of one of the streams that have as many."""
    long_enough = [stream for stream in pool if stream.frames >= lesson.frames]
    stream = long_enough[int(torch.randint(len(long_enough), (), generator=generator))]
    x, y = torch.randint(_CELLS - lesson.cells + 1, (2,), generator=generator).tolist()
    return cut_window(stream, lesson.frames, x, y, lesson.cells)


def cut_window(stream: DecodedStream, frames: int, x: int, y: int, cells: int) -> DecodedStream:
    """The first `frames` latent frames of the square of `cells` latents whose corner is at column `x`, row `y`."""
    pixels = [slice(_SCALE * place, _SCALE * (place + cells)) for place in (y, x)]
    return replace(
        stream,
        latents=stream.latents[:, :frames, y : y + cells, x : x + cells],
        pictures=stream.pictures[:, : 1 + 4 * (frames - 1), pixels[0], pixels[1]],
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Run as a script."""
    parser = argparse.ArgumentParser(description="Train a tiny decoder for the mini pipeline.")
    parser.add_argument("folder", type=Path, help="the pool and checkpoints go here")
    parser.add_argument("pipeline", type=Path, help="folder of the mini pipeline; the decoder goes there")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seed", type=int, default=TrainOptions.seed)
    for name in ("clips", "streams", "steps"):
        parser.add_argument(f"--{name}", type=int, default=getattr(TinyOptions, name))
    parser.add_argument("--save-every", type=int, default=TrainOptions.save_every)
    chosen = parser.parse_args(arguments)
    options = TrainOptions(
        folder=chosen.folder, device=torch.device(chosen.device), seed=chosen.seed, save_every=chosen.save_every
    )
    tiny = TinyOptions(chosen.pipeline, clips=chosen.clips, streams=chosen.streams, steps=chosen.steps)
    decoder, losses = train_tiny_decoder(options, tiny)
    file = export_tiny_decoder(decoder, losses, tiny.pipeline)
    print(f"{file}: {file.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
