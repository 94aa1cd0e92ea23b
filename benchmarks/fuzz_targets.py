"""What of the pack reads what somebody else wrote, each with good inputs, how they are changed, and the call."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import streamblocks_path  # noqa: F401
import torch
from fuzz_foreign import foreign_targets
from fuzz_headers import Seed, parse_seed, quantized_seed, read_seed
from fuzz_inputs import (
    LAYOUTS,
    MINI,
    Write,
    mini_config,
    prepare_folder,
    prepare_tokenizer,
    seeds_of,
    torch_seeds,
    wans_words,
    write_header,
    write_json,
    write_text,
    write_torch,
)
from fuzz_pictures import picture_targets
from fuzz_quantized import quantized_targets
from fuzz_saved import saved_targets
from fuzz_target import Target, names_its_file, names_its_line
from fuzz_texts import TRACKS, text_targets
from safetensors.torch import save

from streamblocks.checkpoints.checkpoint_reading import read_checkpoint
from streamblocks.checkpoints.json_text import read_json
from streamblocks.checkpoints.lora_choice import LoraChoice
from streamblocks.families.model_family import ModelSources
from streamblocks.memory.cleanup import parse_state_rules
from streamblocks.stream.known_families import recognise_family
from streamblocks.stream.prompt_track import PromptTrack
from streamblocks.wan.checkpoints.causality import causality_notice
from streamblocks.wan.checkpoints.components import (
    decoder_component,
    text_encoder_component,
    transformer_component,
    vae_component,
)
from streamblocks.wan.checkpoints.lora_names import put_loras_on
from streamblocks.wan.checkpoints.tokenizer import find_tokenizer
from streamblocks.wan.family import CAUSAL_WAN_21
from streamblocks.wan.vae.tiny_decoder import TinyDecoder, TinyDecoderConfig


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


def _tiny_decoder_seed() -> Seed:
    module = TinyDecoder(TinyDecoderConfig(widths=(16, 12, 8, 8)))
    return parse_seed(save({name: value.half() for name, value in module.state_dict().items()}))


def _decoder_file(folder: Path) -> object:
    component = decoder_component(folder / "taew2_1.safetensors", dtype=torch.bfloat16)
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


def _text(folder: Path) -> str:
    return (folder / "text").read_bytes().decode("utf-8", "surrogatepass")


def _track(folder: Path) -> object:
    track = PromptTrack.parse(_text(folder))
    track.check(100)
    return track.is_mixed


_TOKENIZER_FILES: Mapping[str, Any] = {
    "special_tokens_map.json": {"eos_token": "</s>", "pad_token": {"content": "<pad>", "lstrip": False}},
    "added_tokens.json": {"<a>": 300, "<b>": 301},
}
_RULES = ("videos = drop\nkv_cache = share # kept\nmine = copy", "a = drop")


def make_targets() -> list[Target]:
    """Every parser of the pack that runs without a server."""
    transformers = seeds_of("causal_wan")
    transformers += [
        quantized_seed(transformers[0]),
        read_seed(MINI / "transformer/diffusion_pytorch_model.safetensors"),
    ]
    encoders = seeds_of("comfy_umt5", "comfy_umt5_fp8_scaled", "wan_umt5_original_names")
    layouts = [read_seed(path) for path in sorted(LAYOUTS.glob("*.safetensors"))]
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
        return Target(name, share, write_json(place, values), call, names_its_file, prepare_folder)

    return [
        file_target(
            "header", 20, write_header(layouts, "x.safetensors"), lambda f: read_checkpoint(f / "x.safetensors")
        ),
        file_target("transformer file", 10, write_header(transformers, "model.safetensors"), _transformer_file),
        file_target(
            "vae file", 2, write_header(seeds_of("comfy_wan_vae", "comfy_wan22_vae"), "vae.safetensors"), _vae_file
        ),
        file_target("tiny decoder file", 2, write_header([_tiny_decoder_seed()], "taew2_1.safetensors"), _decoder_file),
        file_target(
            "text encoder file",
            8,
            write_header(encoders, "umt5.safetensors"),
            _text_encoder_file,
        ),
        file_target(
            "lora",
            10,
            write_header(seeds_of("lora_dora", "lora_down_up_diff", "lora_kohya", "lora_peft"), "lora.safetensors"),
            _Lora(),
        ),
        file_target("json", 20, write_json("a.json", [mini_config("vae"), shards]), lambda f: read_json(f / "a.json")),
        folder_target(
            "transformer config",
            14,
            "transformer/config.json",
            [mini_config("transformer"), wans_words()],
            lambda f: transformer_component(f, dtype=torch.bfloat16).bytes,
        ),
        folder_target(
            "vae config",
            8,
            "vae/config.json",
            [mini_config("vae")],
            lambda f: _checked(vae_component(f, dtype=torch.bfloat16)),
        ),
        folder_target(
            "text encoder config",
            10,
            "text_encoder/config.json",
            [mini_config("text_encoder")],
            lambda f: _checked(text_encoder_component(f, dtype=torch.bfloat16)),
        ),
        folder_target("whole folder", 2, "transformer/config.json", [mini_config("transformer")], _all_of_a_folder),
        folder_target(
            "shards",
            4,
            "vae/diffusion_pytorch_model.safetensors.index.json",
            [shards],
            lambda f: vae_component(f, dtype=torch.bfloat16).bytes,
        ),
        folder_target("settings", 6, "streaming.json", [settings], _settings),
        file_target("pytorch file", 4, write_torch(torch_seeds()), lambda f: read_checkpoint(f / "model.pt")),
        Target(
            "tokenizer config",
            1,
            write_json("tokenizer/tokenizer_config.json", [tokenizer]),
            _tokenizer,
            names_its_file,
            prepare_tokenizer,
        ),
        Target(
            "tokenizer",
            1,
            write_json("tokenizer/tokenizer.json", [vocabulary]),
            _tokenizer,
            names_its_file,
            prepare_tokenizer,
        ),
        *(
            Target(
                f"tokenizer {place}",
                1,
                write_json(f"tokenizer/{place}", [value]),
                _tokenizer,
                names_its_file,
                prepare_tokenizer,
            )
            for place, value in _TOKENIZER_FILES.items()
        ),
        Target("track", 30, write_text(TRACKS), _track, names_its_line),
        Target("state rules", 20, write_text(_RULES), lambda f: parse_state_rules(_text(f)), names_its_line),
        *quantized_targets(),
        *saved_targets(),
        *picture_targets(),
        *foreign_targets(),
        *text_targets(),
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
