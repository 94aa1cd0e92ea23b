"""Checkpoints of any size whose weights are holes: they read as zeros and take no room on the disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers import WanTransformer3DModel
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.serialization import skip_data

from streamblocks.wan.checkpoints.original_names import original_name

FOURTEEN_B = {"num_attention_heads": 40, "ffn_dim": 13824, "num_layers": 40}


def write_hollow_files(folder: Path, config: dict[str, Any]) -> tuple[Path, Path]:
    """Write the BF16 transformer of `config`, under Wan's names, as one `.safetensors` and one `.pt` file."""
    with init_empty_weights():
        model = WanTransformer3DModel(**config)
    shapes = {original_name(name): tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    return _write_safetensors(folder / "hollow.safetensors", shapes), _write_torch(folder / "hollow.pt", shapes)


def _write_safetensors(path: Path, shapes: dict[str, tuple[int, ...]]) -> Path:
    entries, offset = {}, 0
    for name, shape in shapes.items():
        end = offset + 2 * torch.Size(shape).numel()
        entries[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    header = json.dumps(entries).encode()
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + offset)
    return path


def _write_torch(path: Path, shapes: dict[str, tuple[int, ...]]) -> Path:
    with FakeTensorMode():
        state = {name: torch.empty(shape, dtype=torch.bfloat16) for name, shape in shapes.items()}
    with skip_data(materialize_fake_tensors=True):
        torch.save({"generator_ema": state}, path)
    return path
