"""Safetensors files with hostile headers: changed good ones, in front of holes where their weights would be."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from fuzz_mutations import RAW_VALUES, change_bytes, change_json

# Tensors whose values are read while a header is: marks and scales.
_SMALL = 2048


@dataclass(frozen=True)
class Seed:
    """A good file.

    Attributes:
        header: as JSON.
        small: the contents of its small tensors, by name.
    """

    header: dict[str, Any]
    small: Mapping[str, bytes]


def read_seed(path: Path) -> Seed:
    """The header of `path`, and what of it is small."""
    return parse_seed(path.read_bytes())


def parse_seed(content: bytes) -> Seed:
    """The same of a file's content."""
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    small = {}
    for name, entry in header.items():
        if name != "__metadata__":
            begin, end = entry["data_offsets"]
            if end - begin <= _SMALL:
                small[name] = content[8 + length + begin : 8 + length + end]
    return Seed(header, small)


def quantized_seed(seed: Seed) -> Seed:
    """The same model as ComfyUI's FP8 files and this pack's have it."""
    header, small = dict(seed.header), dict(seed.small)
    for name, entry in seed.header.items():
        if name.startswith("blocks.") and name.endswith(".weight") and len(entry["shape"]) == 2:
            header[name] = {**entry, "dtype": "F8_E4M3"}
            layer = name.removesuffix(".weight")
            mark = json.dumps({"format": "float8_e4m3fn"}).encode()
            header[f"{layer}.comfy_quant"] = {"dtype": "U8", "shape": [len(mark)]}
            header[f"{layer}.weight_scale"] = {"dtype": "F32", "shape": []}
            small[f"{layer}.comfy_quant"], small[f"{layer}.weight_scale"] = mark, b"\0\0\x80\x3f"
    marks = {"layers": {"blocks.0.self_attn.q": {"format": "float8_e4m3fn"}}}
    header["__metadata__"] = {
        "_quantization_metadata": json.dumps(marks),
        "config": '{"transformer": {"causal_ar": true}}',
    }
    return Seed(header, small)


def write_hollow(path: Path, head: bytes, size: int, small: Mapping[str, bytes]) -> None:
    """A file of `size` bytes that begins with `head`, and has `small` tensors' contents where the header says."""
    with path.open("wb") as file:
        file.write(head)
        file.truncate(size)
        try:
            entries = json.loads(head[8:])
            for name, content in small.items():
                if name in entries:
                    begin = entries[name]["data_offsets"][0]
                    if begin + len(head) + len(content) <= size:
                        file.seek(len(head) + begin)
                        file.write(content)
        except (ValueError, TypeError, LookupError, RecursionError, OSError, OverflowError, AttributeError):
            return


def hollow_copy(source: Path, target: Path) -> None:
    """The header of `source` in front of a hole as long as its tensors."""
    seed = read_seed(source)
    head = source.read_bytes()[: 8 + int.from_bytes(source.read_bytes()[:8], "little")]
    target.parent.mkdir(parents=True, exist_ok=True)
    write_hollow(target, head, source.stat().st_size, seed.small)


def change_header(random: Random, header: dict[str, Any], itemsizes: dict[str, int]) -> tuple[bytes, int]:
    """A safetensors file's first bytes and its size: the header changed, and mostly laid out anew so that it holds.

    Args:
        random: of this input.
        header: of a good file.
        itemsizes: bytes of a number by the name of its dtype.
    """
    entries = {name: dict(entry) if isinstance(entry, dict) else entry for name, entry in header.items()}
    for _ in range(random.choice((0, 1, 1, 2, 4))):
        _change_tensor(random, entries)
    size = _lay_out(entries, itemsizes)
    kind = random.randrange(10)
    if kind < 6:
        text = json.dumps(entries).encode()
    elif kind < 9:
        text = change_json(random, entries).encode()
    else:
        text = change_bytes(random, json.dumps(entries).encode())
    length = len(text)
    if random.randrange(20) == 0:
        length = random.choice((0, 1, length - 1, length + 1, length * 2, 2**31, 2**63, 2**64 - 1, 99_999_999))
    size += len(text) + 8
    if random.randrange(20) == 0:
        size = random.choice((0, 7, 8, 9, size - 1, size + 1, size // 2, size * 2))
    return (max(0, length).to_bytes(8, "little") + text)[: max(0, size)], max(0, size)


def _change_tensor(random: Random, entries: dict[str, Any]) -> None:
    names = [name for name in entries if name != "__metadata__"]
    if not names:
        return
    name = random.choice(names)
    entry = entries[name]
    change: Callable[[], None] = random.choice(
        (
            lambda: entries.pop(name),
            lambda: entries.update({random.choice(names): entry}),
            lambda: entry.update(shape=[random.choice((0, 1, 2, 3, 16, 48, 128, 1000, 2**20)) for _ in entry["shape"]]),
            lambda: entry.update(shape=[*entry["shape"], random.choice((1, 2, 0))]),
            lambda: entry.update(shape=entry["shape"][:-1]),
            lambda: entry.update(shape=[]),
            lambda: entry.update(
                dtype=random.choice(("F64", "F32", "BF16", "F8_E4M3", "I8", "U8", "BOOL", "F4", "I64", "X"))
            ),
            lambda: entries.update({_other_name(random, name): entries.pop(name)}),
            lambda: entries.update({_other_name(random, name): dict(entry)}),
            lambda: entries.update(
                {"__metadata__": {**entries.get("__metadata__", {}), _field(random): _text(random)}}
            ),
        )
    )
    change()


def _other_name(random: Random, name: str) -> str:
    parts = name.split(".")
    number = next((index for index, part in enumerate(parts) if part.isdecimal()), None)
    if number is not None and random.randrange(2):
        parts[number] = random.choice(("999999999", "9" * 5000, "1", "00", "-1", "\u0663", "7", "100"))
        return ".".join(parts)
    extra = (
        "module.",
        "model.",
        "generator_ema.",
        "vae.",
        "x.",
        "diffusion_model.",
        "text_encoders.umt5xxl.transformer.",
    )
    return random.choice(
        (*(prefix + name for prefix in extra), name + ".x", ".".join(reversed(parts)), name[:-1], "." + name, name * 30)
    )


def _field(random: Random) -> str:
    return random.choice(("config", "streamblocks", "_quantization_metadata", "format", "modelspec"))


def _text(random: Random) -> str:
    return random.choice(
        (*RAW_VALUES[:60], '{"layers": {"blocks.0.self_attn.q": {"format": "float8_e4m3fn"}}}', '{"config": {}}')
    )


def _lay_out(entries: dict[str, Any], itemsizes: dict[str, int]) -> int:
    """Offsets that fit the shapes, one tensor behind the other; the bytes of all, up to a terabyte."""
    offset = 0
    for name, entry in entries.items():
        if name != "__metadata__":
            nbytes = min(2**40, math.prod(entry["shape"]) * itemsizes.get(entry["dtype"], 1))
            entry["data_offsets"] = [offset, offset + nbytes]
            offset += nbytes
    return min(offset, 2**41)
