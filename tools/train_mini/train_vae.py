"""First stage: the VAE learns to rebuild clips."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AutoencoderKLWan

from .checkpoint import TrainingState, step_generator
from .clips import draw_clips, draw_plan
from .mini_models import make_vae
from .progress import Progress
from .train_options import TrainOptions, autocast, learning_rate_at

PEAK_RATE = 2e-3
AVERAGE_DECAY = 0.99
KL_WEIGHT = 1e-4
# Pictures per clip and the share of the batch, by progress: the decoder must also learn how a stream goes on, when
# its convolutions remember more than the first latent frames.
_SHORT, _LONG, _LONG_FROM = 9, 17, 0.7
_CHANGE_SHARE = 0.3
CHECKPOINT = "vae_state.safetensors"


def train_vae(options: TrainOptions) -> tuple[AutoencoderKLWan, list[tuple[int, float]]]:
    """Train, or go on training; returns the averaged VAE, on the device, and its losses."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(options.seed)
        vae = make_vae().to(options.device)
    state = TrainingState.start(vae, learning_rate=PEAK_RATE, weight_decay=0.0)
    path = options.folder / CHECKPOINT
    state.load(path)
    progress = Progress("VAE", state.step, options.vae_steps)
    recent = torch.zeros((), device=options.device)
    while state.step < options.vae_steps:
        recent += _make_step(state, options)
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


def _make_step(state: TrainingState, options: TrainOptions) -> torch.Tensor:
    vae: Any = state.module
    generator = step_generator(options.seed, "vae", state.step)
    long = state.step >= _LONG_FROM * options.vae_steps
    frames, clips = (_LONG, max(1, options.vae_batch // 2)) if long else (_SHORT, options.vae_batch)
    cuts = [1 + 4 * latent for latent in range((frames - 1) // 4)]
    plans = [draw_plan(generator, cuts=cuts, change_share=_CHANGE_SHARE) for _ in range(clips)]
    clip = draw_clips(plans, frames, options.device)
    with autocast(options.device):
        posterior = vae.encode(clip).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=generator).to(options.device)
        rebuilt = vae.decode(posterior.mean + posterior.std * noise).sample
    error = (rebuilt.float() - clip).abs().mean()
    mean, log_variance = posterior.mean.float(), posterior.logvar.float()
    divergence = 0.5 * (mean.square() + log_variance.exp() - 1.0 - log_variance).mean()
    loss = error + KL_WEIGHT * divergence
    for group in state.optimizer.param_groups:
        group["lr"] = learning_rate_at(state.step, options.vae_steps, PEAK_RATE)
    state.optimizer.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
    state.optimizer.step()
    return error.detach()
