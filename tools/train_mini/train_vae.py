"""First stage: the VAE learns to rebuild clips."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from diffusers import AutoencoderKLWan

from .checkpoint import TrainingState, step_generator
from .clips import SIZE, draw_clips, draw_plan
from .mini_models import make_vae
from .progress import Progress
from .train_options import TrainOptions, autocast, learning_rate_at
from .vae_start import start_vae

PEAK_RATE = 1e-3
AVERAGE_DECAY = 0.99
CHECKPOINT = "vae_state.safetensors"
# Noise on the latents, so that the decoder forgives what a transformer gets wrong, and what keeps them near unit size.
_NOISE, _SIZE_WEIGHT = 0.1, 1e-4
_CHANGE_SHARE = 0.3
# Steep where Wan's norm divides by a small length; a few such steps would fill Adam's memory.
_LARGEST_GRADIENT = 0.7


@dataclass(frozen=True)
class Lesson:
    """What a part of the training looks at.

    Attributes:
        until: progress at which the part ends.
        window: side of the square cut out of each clip, in pixels.
        pictures: per clip.
        batch: clips per step, as a share of the option's.
    """

    until: float
    window: int
    pictures: int
    batch: float


# Convolutions learn from small windows at a quarter of the cost. Longer clips come later: the decoder must also learn
# how a stream goes on, when its convolutions remember more than the first latent frames. Whole pictures come last, for
# the attention in the middle of the VAE.
LESSONS = (
    Lesson(0.55, SIZE // 2, 5, 1.5),
    Lesson(0.85, SIZE // 2, 13, 0.75),
    Lesson(1.0, SIZE, 13, 0.5),
)


def train_vae(options: TrainOptions) -> tuple[AutoencoderKLWan, list[tuple[int, float]]]:
    """Train, or go on training; returns the averaged VAE, on the device, and its losses."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(options.seed)
        vae = make_vae()
        start_vae(vae)
        vae.to(options.device)
    state = TrainingState.start(vae, learning_rate=PEAK_RATE, weight_decay=0.0)
    path = options.folder / CHECKPOINT
    state.load(path)
    progress = Progress("VAE", state.step, options.vae_steps)
    recent = torch.zeros((), device=options.device)
    while state.step < options.vae_steps:
        recent += _make_step(state, options, vae)
        state.step += 1
        state.update_average(AVERAGE_DECAY)
        if state.step % 20 == 0 or state.step == options.vae_steps:
            state.losses.append((state.step, float(recent) / 20))
            recent.zero_()
            progress.show(state.step, f"loss {state.losses[-1][1]:.4f}")
        if state.step % options.save_every == 0 or state.step == options.vae_steps:
            state.save(path)
    state.use_average()
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
    error = (rebuilt.float() - clip).abs().mean()
    loss = error + _SIZE_WEIGHT * mean.float().square().mean()
    for group in state.optimizer.param_groups:
        group["lr"] = learning_rate_at(state.step, options.vae_steps, PEAK_RATE)
    state.optimizer.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(vae.parameters(), _LARGEST_GRADIENT)
    state.optimizer.step()
    return error.detach()


def _draw_windows(lesson: Lesson, options: TrainOptions, generator: torch.Generator) -> torch.Tensor:
    """[clips, 3, pictures, window, window]; shapes start anywhere, so one corner is as good as any."""
    cuts = [1 + 4 * latent for latent in range((lesson.pictures - 1) // 4)]
    count = max(1, round(lesson.batch * options.vae_batch))
    plans = [draw_plan(generator, cuts=cuts, change_share=_CHANGE_SHARE) for _ in range(count)]
    return draw_clips(plans, lesson.pictures, options.device)[..., : lesson.window, : lesson.window]
