"""Command line: `python -m streamblocks.tools.train_mini FOLDER [--device auto] [--seed 0]`.

After an interruption, the same command resumes the training. FOLDER holds checkpoints and, at the end, the pipeline in
`mini/`, with its losses in `mini/losses.json`.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from .export import export_pipeline
from .latent_pool import make_pool
from .refine_transformer import refine_transformer
from .train_options import SIZES_ON_A_CARD, TrainOptions
from .train_transformer import train_transformer
from .train_vae import train_vae

_COUNTS = (
    "vae_steps",
    "pool_clips",
    "transformer_steps",
    "refine_steps",
    "first_blocks",
    "vae_batch",
    "transformer_batch",
    "save_every",
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line and train."""
    parser = argparse.ArgumentParser(description="Train the mini pipeline.")
    parser.add_argument("folder", type=Path, help="checkpoints, losses and the finished pipeline go here")
    parser.add_argument("--device", default="auto", help="auto: cuda where there is a card, else cpu")
    parser.add_argument("--seed", type=int, default=TrainOptions.seed)
    for name in _COUNTS:
        default = getattr(TrainOptions, name)
        on_a_card = f", on a card {SIZES_ON_A_CARD[name]}" if name in SIZES_ON_A_CARD else ""
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, help=f"default {default}{on_a_card}")
    given = {name: value for name, value in vars(parser.parse_args(arguments)).items() if value is not None}
    device = given.pop("device")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    sizes = {} if device == "cpu" else SIZES_ON_A_CARD
    train(TrainOptions(device=torch.device(device), **(sizes | given)))


def train(options: TrainOptions) -> Path:
    """Run the three stages, or what is left of them; returns the folder of the finished pipeline."""
    began = time.perf_counter()
    options.folder.mkdir(parents=True, exist_ok=True)
    vae, vae_losses = train_vae(options)
    pool = make_pool(vae, options)
    model, transformer_losses = train_transformer(pool, options)
    refinement_losses = refine_transformer(model, pool, options)
    losses = {"vae": vae_losses, "transformer": transformer_losses, "refinement": refinement_losses}
    folder = export_pipeline(options.folder / "mini", vae, pool, model, losses)
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    print(f"{folder}: {size / 1e6:.2f} MB, {(time.perf_counter() - began) / 60:.1f} min", flush=True)
    return folder


if __name__ == "__main__":
    main()
