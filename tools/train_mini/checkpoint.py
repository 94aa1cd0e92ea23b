"""A training stage's state on disk: weights, their running average, Adam's moments, the step, the losses."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn


@dataclass
class TrainingState:
    """What a stage needs to resume exactly where it stopped.

    No random state: every step draws from a generator seeded with its own number.

    Attributes:
        module: being trained.
        optimizer: Adam's kind, over `module`'s parameters.
        average: exponential running average of each parameter.
        step: steps done.
        losses: (step, mean loss since the entry before), for the curves.
    """

    module: nn.Module
    optimizer: torch.optim.Optimizer
    average: dict[str, torch.Tensor]
    step: int = 0
    losses: list[tuple[int, float]] = field(default_factory=list)

    @classmethod
    def start(cls, module: nn.Module, *, learning_rate: float, weight_decay: float) -> TrainingState:
        """The state before the first step."""
        optimizer = torch.optim.AdamW(
            module.parameters(), lr=learning_rate, betas=(0.9, 0.98), weight_decay=weight_decay
        )
        return cls(module, optimizer, {name: p.detach().clone() for name, p in module.named_parameters()})

    @torch.no_grad()
    def update_average(self, decay: float) -> None:
        """Move the average towards the weights; faster in the first steps, so that the start is forgotten."""
        kept = min(decay, (1 + self.step) / (10 + self.step))
        parameters = dict(self.module.named_parameters())
        averages = list(self.average.values())
        torch._foreach_lerp_(averages, [parameters[name] for name in self.average], 1.0 - kept)

    @torch.no_grad()
    def use_average(self) -> None:
        """Load the average into the module; training ends here."""
        for name, parameter in self.module.named_parameters():
            parameter.copy_(self.average[name])

    def save(self, path: Path) -> None:
        """Write everything to `path`; the file there is replaced only once the new one is whole."""
        tensors: dict[str, torch.Tensor] = {}
        for name, parameter in self.module.named_parameters():
            tensors[f"weight/{name}"] = parameter.detach()
            tensors[f"average/{name}"] = self.average[name]
            # Adam has no state for a parameter that no step has reached yet, such as one of later latent frames.
            for key, value in self.optimizer.state[parameter].items():
                tensors[f"{key}/{name}"] = value
        save_whole(path, tensors, {"step": str(self.step), "losses": json.dumps(self.losses)})

    def load(self, path: Path) -> bool:
        """Resume from `path`; returns False, and does nothing, if there is no such file."""
        if not path.is_file():
            return False
        with safe_open(str(path), "pt") as file:
            metadata = file.metadata()
        tensors = load_file(path)
        self.step = int(metadata["step"])
        self.losses = [(step, loss) for step, loss in json.loads(metadata["losses"])]
        with torch.no_grad():
            for name, parameter in self.module.named_parameters():
                parameter.copy_(tensors[f"weight/{name}"])
                self.average[name].copy_(tensors[f"average/{name}"])
                kept = [key for key in ("step", "exp_avg", "exp_avg_sq") if f"{key}/{name}" in tensors]
                if kept:
                    # Adam counts its steps on the CPU.
                    moments = {key: tensors[f"{key}/{name}"].to(parameter.device) for key in kept if key != "step"}
                    self.optimizer.state[parameter] = {"step": tensors[f"step/{name}"], **moments}
        return True


def save_whole(path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file that is never seen half written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".unfinished")
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, unfinished, dict(metadata or {}))
    unfinished.replace(path)


def load_made_with(path: Path, made_with: str) -> dict[str, torch.Tensor] | None:
    """The tensors of a file whose metadata says `made_with`; None where it says something else, or there is no file."""
    if not path.is_file():
        return None
    with safe_open(str(path), "pt") as file:
        same = file.metadata().get("made_with") == made_with
    return load_file(path) if same else None


def step_generator(seed: int, stage: str, step: int) -> torch.Generator:
    """The CPU generator of one step: the same draws at any time and on any device."""
    mixed = torch.tensor([seed, *stage.encode(), step], dtype=torch.int64)
    number = 0
    for value in mixed.tolist():
        number = (number * 1_000_003 + value + 1) % (2**63 - 25)
    return torch.Generator().manual_seed(number)
