"""The pipeline from a training's checkpoints, while it runs or after it.

`python -m streamblocks.tools.train_mini.export output/train_mini models/mini`
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan

from . import refine_transformer
from .checkpoint import TrainingState
from .latent_pool import LatentPool, make_pool
from .mini_models import make_vae, write_pipeline
from .train_options import TrainOptions
from .train_transformer import CHECKPOINT, PEAK_RATE, CaptionedTransformer
from .train_vae import train_vae

Losses = list[tuple[int, float]]


def export_pipeline(
    target: Path, vae: AutoencoderKLWan, pool: LatentPool, model: CaptionedTransformer, losses: dict[str, Losses]
) -> Path:
    """Write the pipeline, float16, and `losses.json` beside its parts; `model` is cast in place. Returns `target`."""
    finished = make_vae(pool.mean, pool.std)
    finished.load_state_dict(vae.state_dict())
    parts = {"transformer": model.transformer, "text_encoder": model.text_encoder, "vae": finished}
    write_pipeline(target, parts)
    (target / "losses.json").write_text(json.dumps(losses))
    return target


def export_checkpoints(options: TrainOptions, target: Path) -> tuple[int, int]:
    """Export what the newest checkpoints in `options.folder` hold; returns the steps of the last two stages.

    Raises:
        ValueError: no checkpoint of the transformer is there.
    """
    model = CaptionedTransformer()
    state = TrainingState.start(model, learning_rate=PEAK_RATE, weight_decay=0.0)
    if not state.load(options.folder / CHECKPOINT):
        raise ValueError(f"{options.folder} has no {CHECKPOINT}: train first, or give the folder of a training.")
    state.use_average()
    refined = TrainingState.start(model, learning_rate=PEAK_RATE, weight_decay=0.0)
    if refined.load(options.folder / refine_transformer.CHECKPOINT):
        refined.use_average()
    # Both return what is on disk: the transformer starts only once they are finished.
    vae, vae_losses = train_vae(options)
    pool = make_pool(vae, options)
    losses = {"vae": vae_losses, "transformer": state.losses, "refinement": refined.losses}
    export_pipeline(target, vae, pool, model.eval().requires_grad_(False), losses)
    return state.step, refined.step


def main(arguments: Sequence[str] | None = None) -> None:
    """Run as a script."""
    parser = argparse.ArgumentParser(description="Write the mini pipeline from a training's checkpoints.")
    parser.add_argument("folder", type=Path, help="of the training")
    parser.add_argument("target", type=Path, help="folder of the pipeline")
    chosen = parser.parse_args(arguments)
    options = TrainOptions(folder=chosen.folder, device=torch.device("cpu"))
    trained, refined = export_checkpoints(options, chosen.target)
    print(f"{chosen.target}: after {trained} steps of the transformer and {refined} of its refinement")


if __name__ == "__main__":
    main()
