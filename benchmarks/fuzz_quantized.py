"""Quantized checkpoints whose marks, scales and header fields are hostile, and tokenizers inside of text encoders."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random
from typing import Any

import streamblocks_path  # noqa: F401
import torch
from fuzz_headers import Seed, quantized_seed, write_hollow
from fuzz_inputs import LAYOUTS, seeds_of
from fuzz_mutations import change_bytes, change_json
from fuzz_target import Target, names_its_file

from streamblocks.ops.quantization import QuantizationSpec
from streamblocks.wan.checkpoints.components import transformer_component
from streamblocks.wan.checkpoints.quantized_checkpoint import file_metadata
from streamblocks.wan.checkpoints.tokenizer import TOKENIZER_KEY, find_tokenizer

_FILE, _TOKENIZER = "quantized.safetensors", "umt5.safetensors"
# Where a sentencepiece model says most: its first pieces, and its specifications at the end.
_HEAD, _TAIL = 2_000, 4_000


def _own_seed(seed: Seed, spec: QuantizationSpec) -> Seed:
    """As this pack writes quantized files."""
    config = transformer_component(LAYOUTS / "causal_wan.safetensors", dtype=torch.bfloat16).config
    header, small = dict(quantized_seed(seed).header), dict(quantized_seed(seed).small)
    for name in [name for name in header if name.endswith(".weight_scale") and spec.format == "int8"]:
        weight = name.removesuffix("_scale")
        rows = header[weight]["shape"][0]
        header[weight] = {**header[weight], "dtype": "I8"}
        header[name], small[name] = {"dtype": "F32", "shape": [rows, 1]}, b"\0\0\x80\x3f" * rows
        small[f"{weight.removesuffix('weight')}comfy_quant"] = b'{"format": "int8_tensorwise"}'
    return Seed({**header, "__metadata__": file_metadata(dict(config), spec)}, small)


class _WriteQuantized:
    def __init__(self) -> None:
        (plain,) = seeds_of("causal_wan")
        specs = (QuantizationSpec("fp8", "per tensor"), QuantizationSpec("int8", "per row"))
        self._seeds = [_own_seed(plain, spec) for spec in specs]

    def __call__(self, random: Random, folder: Path) -> None:
        seed = random.choice(self._seeds)
        fields, small = dict(seed.header["__metadata__"]), dict(seed.small)
        for _ in range(random.choice((1, 1, 2))):
            if random.randrange(2):
                name = random.choice([name for name, text in fields.items() if text.startswith("{")])
                fields[name] = change_json(random, _parsed(fields[name]))
            else:
                name = random.choice(sorted(small))
                is_mark = name.endswith("comfy_quant") and random.randrange(2)
                text = change_json(random, _parsed(small[name])).encode("utf-8", "surrogatepass") if is_mark else b""
                small[name] = text or change_bytes(random, small[name])
        header = {**_laid_out(seed.header, small), "__metadata__": fields}
        text = json.dumps(header).encode()
        end = max(entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__")
        write_hollow(folder / _FILE, len(text).to_bytes(8, "little") + text, 8 + len(text) + end, small)


def _parsed(text: str | bytes) -> Any:  # noqa: ANN401
    """A JSON text as a value; an empty object for what an earlier change has made of it."""
    try:
        value = json.loads(text)
        json.dumps(value).encode()
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {"a": value}


def _laid_out(header: dict[str, Any], small: dict[str, bytes]) -> dict[str, Any]:
    """The tensors one behind the other, small ones as long as their contents, where these are bytes."""
    offset, made = 0, {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        itemsize = {"F32": 4, "BF16": 2, "F16": 2}.get(entry["dtype"], 1)
        shape = [len(small[name])] if name in small and itemsize == 1 else entry["shape"]
        nbytes = itemsize * int(torch.Size(shape).numel())
        made[name] = {**entry, "shape": shape, "data_offsets": [offset, offset + nbytes]}
        offset += nbytes
    return made


def _read(folder: Path) -> object:
    component = transformer_component(folder / _FILE, dtype=torch.bfloat16)
    return component.bytes, component.plan


class _WriteTokenizer:
    def __init__(self) -> None:
        content = (LAYOUTS / "comfy_umt5.safetensors").read_bytes()
        length = int.from_bytes(content[:8], "little")
        begin, end = json.loads(content[8 : 8 + length])[TOKENIZER_KEY]["data_offsets"]
        self._model = content[8 + length + begin : 8 + length + end]

    def __call__(self, random: Random, folder: Path) -> None:
        model = self._model
        place = random.choice((0, _HEAD, len(model) - _TAIL))
        piece = change_bytes(random, model[place : place + _TAIL])
        model = model[:place] + piece + model[place + _TAIL :]
        if random.randrange(6) == 0:
            # A short one: its first pieces and its end.
            model = model[:_HEAD] + model[-_TAIL:]
        entry = {"dtype": "U8", "shape": [len(model)], "data_offsets": [0, len(model)]}
        text = json.dumps({TOKENIZER_KEY: entry}).encode()
        (folder / _TOKENIZER).write_bytes(len(text).to_bytes(8, "little") + text + model)


def _tokenize(folder: Path) -> object:
    tokenizer = find_tokenizer([folder / _TOKENIZER])
    return tokenizer(["a cat", "\u732b || \n"], padding="max_length", max_length=16, truncation=True)


def quantized_targets() -> list[Target]:
    """Of quantized transformers, and tokenizers in text encoders."""
    return [
        Target("quantized checkpoint", 10, _WriteQuantized(), _read, names_its_file),
        Target("tokenizer inside", 3, _WriteTokenizer(), _tokenize, names_its_file),
    ]
