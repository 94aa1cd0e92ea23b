"""Writes one hostile input into a folder: good files of every layout, changed by the generator of the input."""

from __future__ import annotations

import io
import json
import shutil
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from random import Random
from typing import Any

import streamblocks_path  # noqa: F401
import torch
from fuzz_headers import Seed, change_header, hollow_copy, read_seed, write_hollow
from fuzz_mutations import change_bytes, change_json, change_text

from streamblocks.checkpoints.safetensors_reading import DTYPES

ROOT = Path(__file__).resolve().parent.parent
LAYOUTS = ROOT / "tests/data/layouts"
MINI = ROOT / "models/mini"
_ITEMSIZES = {name: dtype.itemsize for name, dtype in DTYPES.items()}

# Writes one input, made by a generator, into the target's folder.
Write = Callable[[Random, Path], None]


def write_header(seeds: Sequence[Seed], name: str) -> Write:
    """Files called `name` with changed headers."""

    def write(random: Random, folder: Path) -> None:
        seed = random.choice(seeds)
        head, size = change_header(random, seed.header, _ITEMSIZES)
        write_hollow(folder / name, head, size, _changed_small(random, seed))

    return write


def _changed_small(random: Random, seed: Seed) -> Mapping[str, bytes]:
    """Contents of small tensors: scales, marks, and tokenizers; of some inputs one is another, as long or shorter."""
    if not seed.small or random.randrange(3):
        return seed.small
    name = random.choice(sorted(seed.small))
    changed = change_bytes(random, seed.small[name])[: len(seed.small[name])]
    return {**seed.small, name: changed}


def prepare_folder(folder: Path) -> None:
    """The mini pipeline, its weights hollow."""
    for component in ("transformer", "vae", "text_encoder"):
        (folder / component).mkdir(parents=True, exist_ok=True)
        shutil.copy(MINI / component / "config.json", folder / component)
        weights = next((MINI / component).glob("*.safetensors"))
        hollow_copy(weights, folder / component / weights.name)


def write_json(place: str, values: Sequence[Any]) -> Write:
    """A changed one of `values` as the JSON file `place`."""

    def write(random: Random, folder: Path) -> None:
        text = change_json(random, random.choice(values))
        content = text.encode("utf-8", "surrogatepass")
        if random.randrange(12) == 0:
            content = change_bytes(random, content)
        (folder / place).write_bytes(content)

    return write


def mini_config(component: str) -> dict[str, Any]:
    """Of a component of the mini pipeline."""
    config: dict[str, Any] = json.loads((MINI / component / "config.json").read_text())
    return config


def wans_words() -> dict[str, Any]:
    """The transformer's config as Wan's own code writes it."""
    config = {"_class_name": "CausalWanModel", "dim": 192, "ffn_dim": 768, "freq_dim": 128, "in_dim": 8, "out_dim": 8}
    return {**config, "num_heads": 6, "num_layers": 6, "text_dim": 64, "num_frame_per_block": 3, "local_attn_size": 21}


# PyTorch's files.


def torch_seeds() -> list[bytes]:
    """Small PyTorch files of both formats."""
    weight = torch.zeros(4, 4)
    contents: list[Any] = [
        {"generator_ema": {"blocks.0.a.weight": weight, "blocks.0.b.weight": weight.t()}, "step": 3},
        {
            "state_dict": {"model.patch_embedding.weight": torch.zeros(2, dtype=torch.bfloat16)},
            "names": ["a", (1, 2.0)],
        },
    ]
    seeds = []
    for content in contents:
        for zipped in (True, False):
            held = io.BytesIO()
            torch.save(content, held, _use_new_zipfile_serialization=zipped)
            seeds.append(held.getvalue())
    return seeds


def write_torch(seeds: Sequence[bytes]) -> Write:
    """Changed ones of `seeds`; in zip files mostly the pickle is changed, and the zip holds."""

    def write(random: Random, folder: Path) -> None:
        seed = random.choice(seeds)
        if seed.startswith(b"PK") and random.randrange(3):
            held = io.BytesIO()
            with zipfile.ZipFile(io.BytesIO(seed)) as old, zipfile.ZipFile(held, "w") as new:
                for entry in old.infolist():
                    content = old.read(entry)
                    if entry.filename.endswith("data.pkl") or random.randrange(20) == 0:
                        content = change_bytes(random, content)
                    if random.randrange(40):
                        new.writestr(entry.filename, content)
            (folder / "model.pt").write_bytes(held.getvalue())
        else:
            (folder / "model.pt").write_bytes(change_bytes(random, seed))

    return write


# Tokenizers, and texts that are no files.


def prepare_tokenizer(folder: Path) -> None:
    """The mini pipeline's tokenizer."""
    shutil.copytree(MINI / "tokenizer", folder / "tokenizer", dirs_exist_ok=True)


def write_text(seeds: Sequence[str]) -> Write:
    """Changed ones of `seeds`."""

    def write(random: Random, folder: Path) -> None:
        text = change_text(random, random.choice(seeds))
        (folder / "text").write_bytes(text.encode("utf-8", "surrogatepass"))

    return write


def seeds_of(*names: str) -> list[Seed]:
    """The twins of users' files, by name."""
    return [read_seed(LAYOUTS / f"{name}.safetensors") for name in names]
