"""Checkpoint files and how a module is filled from them: dtypes, and what is refused in which words."""

import json
import pickle
from pathlib import Path
from shutil import copytree
from typing import Any

import pytest
import torch
from accelerate import init_empty_weights
from safetensors.torch import save_file
from torch import nn

from streamblocks.checkpoints.checkpoint_files import CheckpointError, list_component_files
from streamblocks.checkpoints.checkpoint_reading import index_tensors
from streamblocks.checkpoints.module_loading import load_weights

from wan_loading import load_transformer, load_vae


def test_a_missing_shard_is_named(sharded_folder, tmp_path):
    folder = copytree(sharded_folder / "transformer", tmp_path / "transformer")
    lost = sorted(folder.glob("*.safetensors"))[1]
    lost.unlink()
    with pytest.raises(CheckpointError, match=f"lacks the shard {lost.name}"):
        load_transformer(tmp_path, device="cpu", dtype=torch.float32)


def test_shards_without_an_index_are_refused(sharded_folder, tmp_path):
    folder = copytree(sharded_folder / "transformer", tmp_path / "transformer")
    next(folder.glob("*.index.json")).unlink()
    with pytest.raises(CheckpointError, match="index"):
        list_component_files(folder)


def test_an_index_may_not_leave_its_folder(tmp_path):
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"weight": "../elsewhere.safetensors"}}))
    with pytest.raises(CheckpointError, match="shards must be in its folder"):
        list_component_files(tmp_path)


@pytest.mark.parametrize("kept", [0, 5, 1000, -4], ids=str)
def test_a_truncated_file_is_named(tiny_folder, tmp_path, kept):
    folder = copytree(tiny_folder / "vae", tmp_path / "vae")
    file = folder / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(CheckpointError, match=r"diffusion_pytorch_model\.safetensors is not a complete"):
        load_vae(tmp_path, device="cpu", dtype=torch.float32)


def test_weights_that_need_code_are_refused_unopened(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (pytest.fail, ("the pickle was loaded",))

    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin is not .* so it is not opened"):
        index_tensors(list_component_files(tmp_path))


def test_empty_and_ambiguous_folders_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"no \.safetensors or \.bin file"):
        list_component_files(tmp_path)
    with pytest.raises(CheckpointError, match="absent is not a folder"):
        list_component_files(tmp_path / "absent")
    for name in ("one", "two"):
        save_file({"weight": torch.zeros(1)}, tmp_path / f"{name}.safetensors")
    with pytest.raises(CheckpointError, match=r"several checkpoints \(one.safetensors, two.safetensors\)"):
        list_component_files(tmp_path)
    save_file({"weight": torch.zeros(1)}, tmp_path / "model.safetensors")
    assert list_component_files(tmp_path) == [tmp_path / "model.safetensors"]


class Small(nn.Module):
    """A linear layer, a persistent integer buffer and a buffer that no file holds."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 2)
        self.norm = nn.LayerNorm(2)
        self.register_buffer("count", torch.zeros(2, dtype=torch.int64))
        self.register_buffer("table", torch.arange(4.0), persistent=False)


GOOD = {
    "linear.weight": torch.randn(2, 3),
    "linear.bias": torch.randn(2),
    "norm.weight": torch.randn(2),
    "norm.bias": torch.randn(2),
    "count": torch.tensor([3, 2**40]),
}


def _load_small(tmp_path: Path, state: dict[str, torch.Tensor], **options) -> Any:
    save_file(state, tmp_path / "small.safetensors")
    with init_empty_weights(include_buffers=False):
        module = Small()
    sources = index_tensors([tmp_path / "small.safetensors"])
    load_weights(module, sources, device="cpu", dtype=torch.bfloat16, **options)
    return module


def test_dtypes_follow_the_name_and_the_kind(tmp_path):
    module = _load_small(tmp_path, GOOD, keep_fp32=["norm"])
    assert module.linear.weight.dtype == torch.bfloat16
    assert torch.equal(module.norm.weight, GOOD["norm.weight"])
    assert torch.equal(module.count, GOOD["count"])
    assert torch.equal(module.table, torch.arange(4.0))
    assert _load_small(tmp_path, GOOD, keep_fp32=["nor"]).norm.weight.dtype == torch.bfloat16


def test_loaded_tensors_do_not_depend_on_the_file(tmp_path):
    module = _load_small(tmp_path, GOOD, keep_fp32=["norm"])
    with (tmp_path / "small.safetensors").open("r+b") as file:
        file.write(b"\0" * (tmp_path / "small.safetensors").stat().st_size)
    assert torch.equal(module.norm.weight, GOOD["norm.weight"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"linear.weight": None}, r"small\.safetensors lacks linear\.weight:"),
        (
            {"linear.weight": None, "linear.scale": torch.zeros(1)},
            r"lacks linear\.weight and has unknown linear\.scale",
        ),
        ({"extra": torch.zeros(1)}, "has unknown extra:"),
        ({f"extra{n}": torch.zeros(1) for n in range(5)}, r"extra0, extra1, extra2 \(5 in all\)"),
        ({"linear.weight": torch.zeros(3, 2)}, r"linear\.weight \[3, 2\] instead of \[2, 3\]"),
        ({"linear.weight": torch.zeros(2, 3, dtype=torch.int8)}, r"linear\.weight as torch\.int8"),
        ({"count": torch.zeros(2)}, r"count as torch\.float32"),
    ],
    ids=["missing", "renamed", "extra", "many", "shape", "int8", "float buffer"],
)
def test_what_does_not_fit_is_named(tmp_path, change, message):
    state = {name: tensor for name, tensor in (GOOD | change).items() if tensor is not None}
    with pytest.raises(CheckpointError, match=message):
        _load_small(tmp_path, state)


def test_a_key_in_two_files_is_named(tmp_path):
    files = [tmp_path / "one.safetensors", tmp_path / "two.safetensors"]
    for file in files:
        save_file({"weight": torch.zeros(1)}, file)
    with pytest.raises(CheckpointError, match=r"weight is in both one\.safetensors and two\.safetensors"):
        index_tensors(files)
