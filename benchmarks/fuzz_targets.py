"""What of the pack reads what somebody else wrote, each with good inputs, how they are changed, and the call."""

from __future__ import annotations

import io
import json
import os
import shutil
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import streamblocks_path  # noqa: F401
import torch
from fuzz_mutations import change_bytes, change_header, change_json, change_text

from streamblocks.checkpoints.checkpoint_error import CheckpointError
from streamblocks.checkpoints.checkpoint_reading import read_checkpoint
from streamblocks.checkpoints.json_text import read_json
from streamblocks.checkpoints.lora_choice import LoraChoice
from streamblocks.checkpoints.safetensors_reading import DTYPES
from streamblocks.families.model_family import ModelSources
from streamblocks.memory.cleanup import parse_state_rules
from streamblocks.stream.known_families import recognise_family
from streamblocks.stream.prompt_track import PromptTrack
from streamblocks.wan.checkpoints.causality import causality_notice
from streamblocks.wan.checkpoints.components import text_encoder_component, transformer_component, vae_component
from streamblocks.wan.checkpoints.lora_names import put_loras_on
from streamblocks.wan.checkpoints.tokenizer import find_tokenizer
from streamblocks.wan.family import CAUSAL_WAN_21

ROOT = Path(__file__).resolve().parent.parent
LAYOUTS = ROOT / "tests/data/layouts"
MINI = ROOT / "models/mini"
_ITEMSIZES = {name: dtype.itemsize for name, dtype in DTYPES.items()}
# Longer messages are no sentences.
_LONGEST_MESSAGE = 2000
# Tensors whose values are read while a header is: marks and scales.
_SMALL = 2048

# Writes one input, made by a generator, into the target's folder.
Write = Callable[[Random, Path], None]


@dataclass(frozen=True)
class Target:
    """A parser.

    Attributes:
        name: for reports.
        share: how often it is called beside the others.
        write: makes an input in a folder of its own.
        call: reads it from there.
        is_clear: whether an error says in one sentence what is wrong and where.
        prepare: what lies beside the inputs in the folder.
    """

    name: str
    share: int
    write: Write
    call: Callable[[Path], object]
    is_clear: Callable[[Exception, Path], bool]
    prepare: Callable[[Path], None] = field(default=lambda folder: None)


def names_its_file(error: Exception, folder: Path) -> bool:
    """Whether `error` is the pack's own, in one line, and names a file in `folder`."""
    text = str(error)
    return isinstance(error, CheckpointError) and str(folder) in text and _is_sentence(text)


def names_its_line(error: Exception, folder: Path) -> bool:
    """Whether `error` says in one line which part of a text is wrong."""
    text = str(error)
    named = ("the track", "interpolation is", "state rule", "state_rules")
    return type(error) is ValueError and any(name in text for name in named) and _is_sentence(text)


def _is_sentence(text: str) -> bool:
    return len(text) < _LONGEST_MESSAGE and text.endswith(".") and text.replace("\u2028", "").isprintable()


# Safetensors files: the header is changed, and the file has holes where its weights would be.


@dataclass(frozen=True)
class _Seed:
    header: dict[str, Any]
    # Contents of small tensors by their place in the good file.
    small: Mapping[str, bytes]


def _read_seed(path: Path) -> _Seed:
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    small = {}
    for name, entry in header.items():
        if name != "__metadata__":
            begin, end = entry["data_offsets"]
            if end - begin <= _SMALL:
                small[name] = content[8 + length + begin : 8 + length + end]
    return _Seed(header, small)


def _quantized_seed(seed: _Seed) -> _Seed:
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
    return _Seed(header, small)


def _write_header(seeds: Sequence[_Seed], name: str) -> Write:
    def write(random: Random, folder: Path) -> None:
        seed = random.choice(seeds)
        head, size = change_header(random, seed.header, _ITEMSIZES)
        write_hollow(folder / name, head, size, seed.small)

    return write


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
    seed = _read_seed(source)
    head = source.read_bytes()[: 8 + int.from_bytes(source.read_bytes()[:8], "little")]
    target.parent.mkdir(parents=True, exist_ok=True)
    write_hollow(target, head, source.stat().st_size, seed.small)


def _seeds(*names: str) -> list[_Seed]:
    return [_read_seed(LAYOUTS / f"{name}.safetensors") for name in names]


# Folders in diffusers' layout: hollow weights, and one JSON file that is changed.


def _prepare_folder(folder: Path) -> None:
    for component in ("transformer", "vae", "text_encoder"):
        (folder / component).mkdir(parents=True, exist_ok=True)
        shutil.copy(MINI / component / "config.json", folder / component)
        weights = next((MINI / component).glob("*.safetensors"))
        hollow_copy(weights, folder / component / weights.name)


def _write_json(place: str, values: Sequence[Any]) -> Write:
    def write(random: Random, folder: Path) -> None:
        text = change_json(random, random.choice(values))
        content = text.encode("utf-8", "surrogatepass")
        if random.randrange(12) == 0:
            content = change_bytes(random, content)
        (folder / place).write_bytes(content)

    return write


def _config(component: str) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((MINI / component / "config.json").read_text())
    return config


def _wans_words() -> dict[str, Any]:
    config = {"_class_name": "CausalWanModel", "dim": 192, "ffn_dim": 768, "freq_dim": 128, "in_dim": 8, "out_dim": 8}
    return {**config, "num_heads": 6, "num_layers": 6, "text_dim": 64, "num_frame_per_block": 3, "local_attn_size": 21}


def _all_of_a_folder(folder: Path) -> object:
    family = recognise_family(folder)
    sources = ModelSources(folder, folder, folder, (folder,))
    components = family.components(sources, _options())
    return [(part.bytes, part.layer_bytes) for part in components.values()], family.choose_preset(
        components["transformer"]
    )


def _options() -> Any:  # noqa: ANN401
    from streamblocks.families.model_family import AttentionChoice, ComponentOptions

    return ComponentOptions(torch.bfloat16, torch.bfloat16, None, AttentionChoice(), ())


def _transformer_file(folder: Path) -> object:
    path = folder / "model.safetensors"
    family = recognise_family(path)
    component = transformer_component(path, dtype=torch.bfloat16)
    return family, component.bytes, causality_notice(component.weights), family.choose_preset(component)


def _vae_file(folder: Path) -> object:
    component = vae_component(folder / "vae.safetensors", dtype=torch.bfloat16)
    component.check()
    return component.bytes


def _text_encoder_file(folder: Path) -> object:
    component = text_encoder_component(folder / "umt5.safetensors", dtype=torch.bfloat16)
    component.check()
    return component.bytes, component.layer_bytes


class _Lora:
    """Puts LoRAs on one transformer, whose header is read once."""

    def __init__(self) -> None:
        self._sources: Mapping[str, Any] = {}

    def __call__(self, folder: Path) -> object:
        """Read the LoRA."""
        model = LAYOUTS / "causal_wan.safetensors"
        self._sources = self._sources or transformer_component(model, dtype=torch.bfloat16).weights.sources
        return put_loras_on(self._sources, [LoraChoice(str(folder / "lora.safetensors"))], model)


# PyTorch's files.


def _torch_seeds() -> list[bytes]:
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


def _write_torch(seeds: Sequence[bytes]) -> Write:
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


def _prepare_tokenizer(folder: Path) -> None:
    shutil.copytree(MINI / "tokenizer", folder / "tokenizer", dirs_exist_ok=True)


def _write_text(seeds: Sequence[str]) -> Write:
    def write(random: Random, folder: Path) -> None:
        text = change_text(random, random.choice(seeds))
        (folder / "text").write_bytes(text.encode("utf-8", "surrogatepass"))

    return write


def _text(folder: Path) -> str:
    return (folder / "text").read_bytes().decode("utf-8", "surrogatepass")


def _track(folder: Path) -> object:
    track = PromptTrack.parse(_text(folder))
    track.check(100)
    return track.is_mixed


_TRACKS = (
    "0-3: a calm sea\n4: storm\n8->11: calm again\n12 cut: a street",
    "0s-2.5s: fog\n2.5s-4s: rain",
    "0: a :0.7 || b :0.3\n5 strength 0.4: c",
)
_RULES = ("videos = drop\nkv_cache = share # kept\nmine = copy", "a = drop")


def make_targets() -> list[Target]:
    """Every parser of the pack that runs without a server."""
    transformers = _seeds("causal_wan")
    transformers += [
        _quantized_seed(transformers[0]),
        _read_seed(MINI / "transformer/diffusion_pytorch_model.safetensors"),
    ]
    layouts = [_read_seed(path) for path in sorted(LAYOUTS.glob("*.safetensors"))]
    shards = {
        "metadata": {"total_size": 1},
        "weight_map": {"a": "diffusion_pytorch_model.safetensors", "b": "x.safetensors"},
    }
    settings = json.loads((MINI / "streaming.json").read_text()) | {"steps": 4, "shift": 5.0, "kv_policy": "rolling"}
    tokenizer = json.loads((MINI / "tokenizer/tokenizer_config.json").read_text())
    vocabulary = json.loads((MINI / "tokenizer/tokenizer.json").read_text())

    def file_target(name: str, share: int, write: Write, call: Callable[[Path], object]) -> Target:
        return Target(name, share, write, call, names_its_file)

    def folder_target(
        name: str, share: int, place: str, values: Sequence[Any], call: Callable[[Path], object]
    ) -> Target:
        return Target(name, share, _write_json(place, values), call, names_its_file, _prepare_folder)

    return [
        file_target(
            "header", 20, _write_header(layouts, "x.safetensors"), lambda f: read_checkpoint(f / "x.safetensors")
        ),
        file_target("transformer file", 10, _write_header(transformers, "model.safetensors"), _transformer_file),
        file_target(
            "vae file", 2, _write_header(_seeds("comfy_wan_vae", "comfy_wan22_vae"), "vae.safetensors"), _vae_file
        ),
        file_target(
            "text encoder file",
            8,
            _write_header(_seeds("comfy_umt5", "comfy_umt5_fp8_scaled", "wan_umt5_original_names"), "umt5.safetensors"),
            _text_encoder_file,
        ),
        file_target(
            "lora",
            10,
            _write_header(_seeds("lora_dora", "lora_down_up_diff", "lora_kohya", "lora_peft"), "lora.safetensors"),
            _Lora(),
        ),
        file_target("json", 20, _write_json("a.json", [_config("vae"), shards]), lambda f: read_json(f / "a.json")),
        folder_target(
            "transformer config",
            14,
            "transformer/config.json",
            [_config("transformer"), _wans_words()],
            lambda f: transformer_component(f, dtype=torch.bfloat16).bytes,
        ),
        folder_target(
            "vae config",
            8,
            "vae/config.json",
            [_config("vae")],
            lambda f: _checked(vae_component(f, dtype=torch.bfloat16)),
        ),
        folder_target(
            "text encoder config",
            10,
            "text_encoder/config.json",
            [_config("text_encoder")],
            lambda f: _checked(text_encoder_component(f, dtype=torch.bfloat16)),
        ),
        folder_target("whole folder", 2, "transformer/config.json", [_config("transformer")], _all_of_a_folder),
        folder_target(
            "shards",
            4,
            "vae/diffusion_pytorch_model.safetensors.index.json",
            [shards],
            lambda f: vae_component(f, dtype=torch.bfloat16).bytes,
        ),
        folder_target("settings", 6, "streaming.json", [settings], _settings),
        file_target("pytorch file", 4, _write_torch(_torch_seeds()), lambda f: read_checkpoint(f / "model.pt")),
        Target(
            "tokenizer config",
            1,
            _write_json("tokenizer/tokenizer_config.json", [tokenizer]),
            _tokenizer,
            names_its_file,
            _prepare_tokenizer,
        ),
        Target(
            "tokenizer",
            1,
            _write_json("tokenizer/tokenizer.json", [vocabulary]),
            _tokenizer,
            names_its_file,
            _prepare_tokenizer,
        ),
        Target("track", 30, _write_text(_TRACKS), _track, names_its_line),
        Target("state rules", 20, _write_text(_RULES), lambda f: parse_state_rules(_text(f)), names_its_line),
    ]


def _checked(component: Any) -> object:  # noqa: ANN401
    component.check()
    return component.bytes, component.layer_bytes


class _Settings:
    """Chooses the preset of one folder, whose transformer is read once."""

    def __init__(self) -> None:
        self._components: dict[str, Any] = {}

    def __call__(self, folder: Path) -> object:
        """Read `streaming.json`."""
        place = os.fspath(folder)
        if place not in self._components:
            self._components[place] = transformer_component(folder, dtype=torch.bfloat16)
        return CAUSAL_WAN_21.choose_preset(self._components[place])


_settings = _Settings()


def _tokenizer(folder: Path) -> object:
    return find_tokenizer([folder])
