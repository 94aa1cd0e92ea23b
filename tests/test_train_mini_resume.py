"""A killed and resumed training ends with the same weights as an uninterrupted one."""

import pytest
import torch
from safetensors.torch import load_file

from streamblocks.tools.train_mini.__main__ import train
from streamblocks.tools.train_mini.checkpoint import TrainingState
from streamblocks.tools.train_mini.train_options import TrainOptions

PARTS = (
    "vae/diffusion_pytorch_model.safetensors",
    "transformer/diffusion_pytorch_model.safetensors",
    "text_encoder/model.safetensors",
)


class Killed(BaseException):
    """Stands for the kill."""


def options(folder):
    sizes = {
        "vae_steps": 2,
        "pool_clips": 2,
        "transformer_steps": 2,
        "refine_steps": 2,
        "vae_batch": 1,
        "transformer_batch": 1,
        "first_blocks": 2,
    }
    return TrainOptions(folder=folder, device=torch.device("cpu"), save_every=1, **sizes)


def test_killed_in_each_stage_and_run_again_gives_the_same_weights(tmp_path, monkeypatch):
    whole = train(options(tmp_path / "whole"))
    save, killed_after = TrainingState.save, [1, 2, 2]

    def save_and_be_killed(self, path):
        save(self, path)
        killed_after[0] -= 1
        if killed_after[0] == 0:
            killed_after.pop(0)
            raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(TrainingState, "save", save_and_be_killed)
        # In the middle of the first stage, of the second, of the third.
        for _ in range(3):
            with pytest.raises(Killed):
                train(options(tmp_path / "killed"))
    again = train(options(tmp_path / "killed"))
    for part in PARTS:
        expected, found = load_file(whole / part), load_file(again / part)
        assert expected.keys() == found.keys()
        for name, tensor in expected.items():
            assert torch.equal(tensor, found[name]), name
