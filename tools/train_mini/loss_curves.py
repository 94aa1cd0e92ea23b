"""The losses of a training as a picture: `python -m streamblocks.tools.train_mini.loss_curves LOSSES.json OUT.png`."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

_LABELS = {
    "vae": "VAE: mean absolute error on shapes, pixels in -1..1",
    "transformer": "transformer: mean squared error of the velocity",
    "refinement": "refinement: the same, from its own guesses",
}


def draw_loss_curves(losses: dict[str, list[list[float]]], target: Path) -> None:
    """Draw one panel per stage from {stage: [[step, mean loss], ...]} into the PNG `target`."""
    figure, panels = plt.subplots(1, len(losses), figsize=(5.0 * len(losses), 3.0), layout="constrained")
    for (stage, entries), panel in zip(losses.items(), panels, strict=True):
        steps, values = zip(*entries, strict=True)
        panel.semilogy(steps, values, linewidth=0.8)
        panel.set(title=_LABELS[stage], xlabel="step")
        panel.title.set_fontsize(9)
        panel.grid(alpha=0.3, which="both")
    figure.savefig(target, dpi=80)
    plt.close(figure)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run as a script."""
    parser = argparse.ArgumentParser(description="Draw the losses of a training.")
    parser.add_argument("losses", type=Path)
    parser.add_argument("target", type=Path)
    options = parser.parse_args(arguments)
    draw_loss_curves(json.loads(options.losses.read_text()), options.target)


if __name__ == "__main__":
    main()
