"""The trainer's sizes follow the device, and the command line takes precedence."""

from __future__ import annotations

import pytest
import torch

from streamblocks.tools.train_mini import __main__ as command
from streamblocks.tools.train_mini.train_options import SIZES_ON_A_CARD, TrainOptions


@pytest.fixture
def options_for(monkeypatch, tmp_path):
    def options(*arguments):
        chosen: list[TrainOptions] = []
        monkeypatch.setattr(command, "train", chosen.append)
        command.main([str(tmp_path), *arguments])
        return chosen[0]

    return options


def test_two_cores_get_the_small_sizes(options_for, tmp_path):
    assert options_for("--device", "cpu") == TrainOptions(tmp_path, torch.device("cpu"))


def test_a_card_gets_the_large_ones(options_for, tmp_path):
    assert options_for("--device", "cuda") == TrainOptions(tmp_path, torch.device("cuda"), **SIZES_ON_A_CARD)


def test_what_is_given_comes_first(options_for):
    chosen = options_for("--device", "cuda", "--transformer-batch", "3", "--vae-steps", "7", "--seed", "5")
    assert (chosen.transformer_batch, chosen.vae_steps, chosen.seed) == (3, 7, 5)
    assert chosen.pool_clips == SIZES_ON_A_CARD["pool_clips"]
