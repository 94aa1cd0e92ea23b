"""What a workflow brings that is no file: tracks that are edited, lists, patterns, names, and numbers."""

from __future__ import annotations

import json
import math
import re
from dataclasses import fields
from pathlib import Path
from random import Random
from typing import Any

import streamblocks_path  # noqa: F401
from fuzz_inputs import Write, write_text
from fuzz_mutations import change_text
from fuzz_target import Target, names

from streamblocks.families.step_list import StepList
from streamblocks.ops.layer_presets import LayerPreset
from streamblocks.ops.quantization import QuantizationSpec, plan_layers
from streamblocks.stream.block_clock import BlockClock
from streamblocks.stream.choices import StreamChoices
from streamblocks.stream.prompt_track import PromptTrack
from streamblocks.stream.recipe import Recipe

TRACKS = (
    "0-3: a calm sea\n4: storm\n8->11: calm again\n12 cut: a street",
    "0s-2.5s: fog\n2.5s-4s: rain",
    "0: a :0.7 || b :0.3\n5 strength 0.4: c",
    '0: a\n3 now: b\n5 exact: "two\\nlines || c"\n7 strength 0.2 bias 1:\n9 exact: [["a\\ncat", 0.7], ["a dog", 0.3]]',
)
_LISTS = ("1000, 750, 500, 250", "raw: 700, 500", "999")
_PATTERNS = ("blocks.0.*\n*.ffn.*", "text_encoder: *.[qkv]\nblocks.[!0-9].?")
_PLACES = ("owner/name", "/models/a.safetensors", "0123456789abcdef0123456789abcdef01234567")
_NUMBERS = (0, 1, -1, 2, 16, 24, 0.5, 1e-9, 1e308, 2**31, 2**63, 2**64, 10**30, 10**400, math.nan, math.inf, -math.inf)
_WORDS = ("", "auto", "recompute", "rolling", "x" * 3000, "\x00", "\ud800", "a\nb", "bf16", "none")


def _read(folder: Path) -> str:
    return (folder / "text").read_bytes().decode("utf-8", "surrogatepass")


def _write_edited(random: Random, folder: Path) -> None:
    """A track, and edits in the order in which they come: of each the block, and what it says."""
    track = random.choice(TRACKS)
    if random.randrange(2):
        track = change_text(random, track)
    edits = [
        [
            random.choice((0, 1, 4, 8, 9, 12, 10**6, random.randrange(20))),
            random.choice((None, "a fox", change_text(random, random.choice(TRACKS)))),
            random.choice((None, random.random())),
            random.choice((None, 1 - random.random())),
        ]
        for _ in range(random.choice((1, 2, 5, 20)))
    ]
    (folder / "text").write_bytes(json.dumps([track, edits]).encode())


def _edit(folder: Path) -> object:
    """Place a track, edit it, write it, and read what was written: a track that does the same."""
    text, edits = json.loads(_read(folder))
    placed = PromptTrack.parse(text).place(None, BlockClock(9, 12, 16.0, 9))
    for block, prompt, strength, bias in edits:
        placed = placed.with_edit(block, prompt=prompt, strength=strength, attention_bias=bias)
        placed.until(block + 1)
    again = PromptTrack.parse(placed.written(), placed.interpolation).place(None, None)
    for block in range(24):
        same = [
            (one.strength_at(block, 0.5), one.bias_at(block, 1.0), one.at(block) if one.lines else None)
            for one in (placed, again)
        ]
        if same[0] != same[1]:
            raise AssertionError(f"block {block} is another one in what was written")
    return placed.describe() if placed.lines else None


def _skip(folder: Path) -> object:
    patterns = tuple(line.strip() for line in _read(folder).splitlines() if line.strip())
    spec = QuantizationSpec(format="fp8", components=("transformer", "text_encoder"), skip=patterns)
    shapes = {f"blocks.{layer}.{part}": (32, 32) for layer in range(3) for part in ("ffn.net", "attn1.q")}
    return plan_layers(shapes, spec, "transformer", LayerPreset(re.compile(".*"), {}, "another layer"))


def _write_choices(random: Random, folder: Path) -> None:
    changed = [field for field in fields(StreamChoices) if random.randrange(6) == 0]
    values: dict[str, Any] = {}
    for field in changed:
        kind = str(field.type)
        if "float" in kind:
            values[field.name] = random.choice([n for n in _NUMBERS if isinstance(n, float)])
        elif "int" in kind:
            values[field.name] = random.choice([n for n in _NUMBERS if isinstance(n, int)])
        elif "str" in kind and "StepList" not in kind:
            values[field.name] = random.choice(_WORDS)
        elif kind == "bool":
            values[field.name] = bool(random.randrange(2))
    (folder / "text").write_text(json.dumps(values))


def _choose(folder: Path) -> object:
    choices = StreamChoices(**json.loads(_read(folder)))
    choices.check(16)
    return choices


def _recipe(folder: Path) -> object:
    text = _read(folder)
    names_of = ("model", "components", "revision", "vae", "dtype", "blocks")
    values = dict(zip(names_of, text.split("\n"), strict=False))
    return Recipe(**{name: value or None for name, value in values.items()}).notices  # type: ignore[arg-type]


def _text_target(name: str, share: int, write: Write, call: Any, *words: str) -> Target:  # noqa: ANN401
    return Target(name, share, write, call, names(*words))


def text_targets() -> list[Target]:
    """Of what is typed into nodes, and what pages change."""
    of_choices = [f"{field.name} " for field in fields(StreamChoices)] + ["the stream"]
    recipes = ["\n".join(_PLACES) + "\n/a/vae\nauto\nbuilt-in", "/a\n\n\n\nfloat16"]
    of_recipe = [f"{field.name} is" for field in fields(Recipe)]
    return [
        _text_target("edited track", 16, _write_edited, _edit, "the track"),
        _text_target("step list", 6, write_text(_LISTS), lambda f: StepList.parse("steps", _read(f)), "steps "),
        _text_target("skip patterns", 4, write_text(_PATTERNS), _skip, "skip "),
        _text_target("stream choices", 6, _write_choices, _choose, *of_choices),
        _text_target("recipe", 4, write_text(recipes), _recipe, *of_recipe),
    ]
