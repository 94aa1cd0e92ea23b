"""Sizes and lengths of the training; the defaults are what the shipped weights were made with."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass(frozen=True)
class TrainOptions:
    """All a run is made with.

    Attributes:
        folder: checkpoints, pool of latents, losses and the finished pipeline go here.
        device: to train on.
        seed: of everything drawn.
        vae_steps: of the first stage.
        pool_clips: encoded before the second stage.
        transformer_steps: of the second stage.
        refine_steps: of the third stage.
        own_streams: made by the transformer for the third stage.
        few_step_share: last share of the second stage, which trains on the sampler's own four timesteps.
        vae_batch: clips per step, as the lessons of `train_vae` take shares of.
        transformer_batch: clips of 4 blocks per step.
        save_every: steps between checkpoints.
    """

    folder: Path
    device: torch.device
    seed: int = 0
    vae_steps: int = 4000
    pool_clips: int = 3072
    transformer_steps: int = 3000
    refine_steps: int = 500
    own_streams: int = 512
    few_step_share: float = 0.4
    vae_batch: int = 4
    transformer_batch: int = 8
    save_every: int = 200


def learning_rate_at(step: int, total: int, peak: float, *, warm_up: int = 100, floor: float = 0.02) -> float:
    """Linear warm-up, then a cosine down to `floor * peak`."""
    if step < warm_up:
        return peak * (step + 1) / warm_up
    progress = (step - warm_up) / max(1, total - warm_up)
    return peak * (floor + (1.0 - floor) * 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress))))


def autocast(device: torch.device) -> torch.autocast:
    """bfloat16 where a matrix product or a convolution gains from it."""
    return torch.autocast(device.type, torch.bfloat16)
