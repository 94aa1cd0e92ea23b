"""The loop that all stages of the training run, and the step of the optimizer within it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from .checkpoint import TrainingState
from .progress import Progress
from .train_options import TrainOptions

_STEPS_PER_ENTRY = 20


@dataclass(frozen=True)
class Stage:
    """What differs between the stages.

    Attributes:
        name: for the progress bar.
        figure: what a step's figure is.
        steps: in all.
        average_decay: of the running average of the weights.
        checkpoint: name of the file.
    """

    name: str
    figure: str
    steps: int
    average_decay: float
    checkpoint: str


def follow_gradient(
    state: TrainingState, loss: torch.Tensor, *, learning_rate: float, largest_gradient: float = 1.0
) -> None:
    """One step of the optimizer down the gradient of `loss`, which is cut to the norm `largest_gradient`."""
    for group in state.optimizer.param_groups:
        group["lr"] = learning_rate
    state.optimizer.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(state.module.parameters(), largest_gradient)
    state.optimizer.step()


def run_stage(stage: Stage, state: TrainingState, options: TrainOptions, make_step: Callable[[], torch.Tensor]) -> None:
    """Train, or resume from the checkpoint, to the stage's last step; the module then holds the averaged weights.

    Args:
        stage: which.
        state: at its start.
        options: folder and how often to save.
        make_step: makes step number `state.step`; returns its figure, a scalar on the device.
    """
    path: Path = options.folder / stage.checkpoint
    state.load(path)
    progress = Progress(stage.name, state.step, stage.steps)
    recent, counted = torch.zeros((), device=options.device), 0
    while state.step < stage.steps:
        recent += make_step()
        counted += 1
        state.step += 1
        state.update_average(stage.average_decay)
        last = state.step == stage.steps
        if state.step % _STEPS_PER_ENTRY == 0 or last:
            state.losses.append((state.step, float(recent) / counted))
            recent.zero_()
            counted = 0
            progress.show(state.step, f"{stage.figure} {state.losses[-1][1]:.4f}")
        if state.step % options.save_every == 0 or last:
            state.save(path)
    state.use_average()
