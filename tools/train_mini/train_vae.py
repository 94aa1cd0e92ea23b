"""First stage: the VAE learns to rebuild clips."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from diffusers import AutoencoderKLWan

from .checkpoint import TrainingState, step_generator
from .clips import SIZE, draw_clips, draw_plan, draw_tiles
from .mini_models import make_vae
from .train_options import TrainOptions, autocast, learning_rate_at
from .training_loop import Stage, follow_gradient, run_stage
from .vae_start import start_vae

PEAK_RATE = 1.5e-3
AVERAGE_DECAY = 0.99
CHECKPOINT = "vae_state.safetensors"
# Noise on the latents, so that the decoder tolerates a transformer's errors; weight of the loss on the latents' size.
_NOISE, _SIZE_WEIGHT = 0.1, 1e-4
_CHANGE_SHARE = 0.3
_SHAPE_WEIGHT, _LEAST_SPREAD = 6.0, 0.2
# Gradients are steep where Wan's norm divides by a small length; a few such steps would dominate Adam's moments.
_LARGEST_GRADIENT = 2.0


@dataclass(frozen=True)
class Lesson:
    """What one part of the training uses.

    Attributes:
        until: progress at which the part ends.
        window: side of the square cut out of each clip, in pixels.
        pictures: per clip.
        batch: clips per step, as a share of the option's.
        tiles: still squares of flat colours, in place of clips.
    """

    until: float
    window: int
    pictures: int
    batch: float
    tiles: bool = False


# Colours first, on flat tiles, in a hundred steps: begun with moving shapes, no colour reached the latents in five
# hundred. Then single pictures, then motion. Convolutions learn from small windows at a quarter of the cost. Longer
# clips come later: the decoder must also learn how a stream goes on, when its convolutions remember more than the first
# latent frames. Whole pictures come last, for the attention in the middle of the VAE.
LESSONS = (
    Lesson(0.05, SIZE // 2, 1, 1.5, tiles=True),
    Lesson(0.45, SIZE // 2, 1, 1.5),
    Lesson(0.75, SIZE // 2, 5, 1.5),
    Lesson(0.92, SIZE // 2, 13, 0.75),
    Lesson(1.0, SIZE, 13, 0.5),
)


def train_vae(options: TrainOptions) -> tuple[AutoencoderKLWan, list[tuple[int, float]]]:
    """Train, or resume training; returns the averaged VAE, on the device, and its losses."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(options.seed)
        vae = make_vae()
        start_vae(vae)
        vae.to(options.device)
    state = TrainingState.start(vae, learning_rate=PEAK_RATE, weight_decay=0.0)
    stage = Stage("VAE", "error on shapes", options.vae_steps, AVERAGE_DECAY, CHECKPOINT)
    run_stage(stage, state, options, lambda: _make_step(state, options, vae))
    return vae.eval().requires_grad_(False), state.losses


def decode_unclamped(vae: AutoencoderKLWan, latents: torch.Tensor) -> torch.Tensor:
    """As `vae.decode`, which clamps to -1..1: a pixel beyond would learn nothing."""
    features: list[torch.Tensor | None] = [None] * vae._cached_conv_counts["decoder"]
    z = vae.post_quant_conv(latents)
    pictures = [
        vae.decoder(frame, feat_cache=features, feat_idx=[0], first_chunk=index == 0)
        for index, frame in enumerate(z.split(1, dim=2))
    ]
    return torch.cat(pictures, dim=2)


def _make_step(state: TrainingState, options: TrainOptions, vae: AutoencoderKLWan) -> torch.Tensor:
    generator = step_generator(options.seed, "vae", state.step)
    lesson = next(lesson for lesson in LESSONS if state.step < lesson.until * options.vae_steps)
    clip = _draw_windows(lesson, options, generator)
    with autocast(options.device):
        mean = vae.encode(clip).latent_dist.mean
        noise = torch.randn(mean.shape, generator=generator).to(options.device)
        rebuilt = decode_unclamped(vae, mean + _NOISE * noise)
    rebuilt = rebuilt.float()
    loss = weighted_error(rebuilt, clip) + _SIZE_WEIGHT * mean.float().square().mean()
    rate = learning_rate_at(state.step, options.vae_steps, PEAK_RATE)
    follow_gradient(state, loss, learning_rate=rate, largest_gradient=_LARGEST_GRADIENT)
    colored = _is_colored(clip).expand_as(clip)
    # Of the shapes alone: a picture without any colour has a small error on the whole.
    return (rebuilt.detach() - clip)[colored].abs().sum() / colored.sum().clamp(min=1)


def weighted_error(rebuilt: torch.Tensor, clip: torch.Tensor) -> torch.Tensor:
    """Absolute and squared error, with more weight on the pixels of shapes: of what is shown, and of what should be.

    Absolute error alone ends with every shape in grey: where the decoder is unsure of a colour, the median over red,
    green, blue and yellow is a grey, and the encoder is never asked for more.
    """
    weight = 1.0 + _SHAPE_WEIGHT * (_is_colored(clip) | _is_colored(rebuilt.detach()))
    error = rebuilt - clip
    return (weight * (error.abs() + 2.0 * error.square())).mean() / weight.mean()


def _is_colored(clip: torch.Tensor) -> torch.Tensor:
    return clip.amax(1, keepdim=True) - clip.amin(1, keepdim=True) > _LEAST_SPREAD


def _draw_windows(lesson: Lesson, options: TrainOptions, generator: torch.Generator) -> torch.Tensor:
    """[clips, 3, pictures, window, window]; shapes start anywhere, so one corner is as good as any."""
    count = max(1, round(lesson.batch * options.vae_batch))
    if lesson.tiles:
        return draw_tiles(count, lesson.window, generator).to(options.device)
    cuts = [1 + 4 * latent for latent in range((lesson.pictures - 1) // 4)]
    share = _CHANGE_SHARE if cuts else 0.0
    plans = [draw_plan(generator, cuts=cuts, change_share=share) for _ in range(count)]
    return draw_clips(plans, lesson.pictures, options.device)[..., : lesson.window, : lesson.window]
