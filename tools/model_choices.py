"""The models that a command line asks for: names as the loader lists them, or paths, linked into the models folder."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

LOADER, LORA, SAMPLER = "StreamBlocksLoadPipeline", "StreamBlocksLora", "StreamBlocksSampler"
_LORA_FILES = "loras"
_STRENGTH = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")
_SHOWN_NAMES = 4


class ModelFolders(Protocol):
    """ComfyUI's model folders, and what nodes list of them."""

    models: Path

    def model_roots(self, kind: str) -> list[Path]:
        """The folders of a kind of models, such as "vae"."""

    def listed(self, class_type: str, key: str) -> list[str]:
        """The choices that an input of a node offers at this moment."""


@dataclass(frozen=True)
class ModelOption:
    """An option that names a model.

    Attributes:
        flag: as typed, such as "--vae".
        class_type: of the node with the input.
        key: the input that lists the names.
        files: the kind of models that a single file is; None: a file is refused.
        folders: the kind that a folder is; None: a folder is refused.
    """

    flag: str
    class_type: str
    key: str
    files: str | None
    folders: str | None = None


MODEL_OPTIONS = {
    "model": ModelOption("--model", LOADER, "model", "diffusion_models", "diffusers"),
    "components": ModelOption("--components", LOADER, "components", None, "diffusers"),
    "vae": ModelOption("--vae", LOADER, "vae", "vae"),
    "decoder": ModelOption("--decoder", LOADER, "decoder", "vae_approx"),
    "text_encoder": ModelOption("--text-encoder", LOADER, "text_encoder", "text_encoders"),
}
LORA_OPTION = ModelOption("--lora", LORA, "lora", _LORA_FILES)


@dataclass(frozen=True)
class LoraWish:
    """A LoRA, by name or path, and its strength."""

    name: str
    strength: float = 1.0


def parse_lora(text: str) -> LoraWish:
    """`NAME` or `NAME:STRENGTH`; what follows the last colon is a strength only if it is a number."""
    name, colon, strength = text.rpartition(":")
    return LoraWish(name, float(strength)) if colon and _STRENGTH.fullmatch(strength) else LoraWish(text)


def choose_models(wanted: Iterable[tuple[ModelOption, str]], host: ModelFolders) -> list[str]:
    """The names to give to the nodes, one for each of `wanted`; paths on disk are linked into the models folder.

    Raises:
        ValueError: something is neither listed nor on disk, or is not of the right kind. No link is left behind.
    """
    wishes = list(wanted)
    # Once, before any link: ComfyUI goes by a folder's time, and two changes in a row may have the same.
    listed = {option: host.listed(option.class_type, option.key) for option, _ in wishes}
    made: list[Path] = []
    try:
        names = [
            text if text in listed[option] else _place(text, option, host, listed[option], made)
            for option, text in wishes
        ]
        _check_listed(wishes, names, host)
    except ValueError:
        for link in made:
            link.unlink()
        raise
    return names


def _place(text: str, option: ModelOption, host: ModelFolders, listed: Sequence[str], made: list[Path]) -> str:
    """The name of a path on disk, once it is in the models folder; a link that this takes is added to `made`."""
    path = Path(text).expanduser()
    if not text or not path.exists():
        raise ValueError(
            f"{option.flag} is {text!r}, which is neither a name that {option.class_type} lists nor a path on this "
            f"machine: {_advice(text, listed)}."
        )
    kind = option.folders if path.is_dir() else option.files
    if kind is None:
        have, need = ("folder", "file") if path.is_dir() else ("file", "folder in diffusers' layout")
        raise ValueError(f"{option.flag} is {text!r}, a {have}: give a {need}.")
    name = _name_in_roots(path, host.model_roots(kind)) or _link(path, host.models / kind, made)
    return name if kind == _LORA_FILES else f"{kind}/{name}"


def _advice(text: str, listed: Sequence[str]) -> str:
    names = [name for name in listed if "/" in name or "." in name]
    if not names:
        return "there is no such model in the models folder, which --models names"
    near = difflib.get_close_matches(text, names, n=_SHOWN_NAMES, cutoff=0.4) or names[:_SHOWN_NAMES]
    return f"it lists {', '.join(near)}{' and others' if len(near) < len(names) else ''}"


def _name_in_roots(path: Path, roots: Iterable[Path]) -> str | None:
    """The name of what lies in one of the model folders already."""
    place = path.resolve() if ".." in path.parts else path.absolute()
    inside = (place.relative_to(root).as_posix() for root in roots if root in place.parents)
    return next(inside, None)


def _link(path: Path, folder: Path, made: list[Path]) -> str:
    place = path.absolute()
    link = folder / (place.name if place.name != ".." else place.resolve().name)
    folder.mkdir(parents=True, exist_ok=True)
    # A broken link of that name is from an earlier run.
    if link.is_symlink() and not link.exists():
        link.unlink()
    if not link.exists():
        link.symlink_to(path.resolve(), target_is_directory=path.is_dir())
        made.append(link)
    elif not link.samefile(path):
        raise ValueError(f"{link} is another model of the same name: rename {path}.")
    return link.name


def _check_listed(wishes: Sequence[tuple[ModelOption, str]], names: Sequence[str], host: ModelFolders) -> None:
    listed = {option: host.listed(option.class_type, option.key) for option, _ in wishes}
    for (option, text), name in zip(wishes, names, strict=True):
        if name not in listed[option]:
            need = ["a .safetensors or .pt file"] * (option.files is not None)
            need += ["a folder in diffusers' layout"] * (option.folders is not None)
            raise ValueError(
                f"{option.flag} is {text!r}, which {option.class_type} does not list: give {' or '.join(need)}."
            )


def insert_loras(prompt: dict[str, dict[str, Any]], loras: Sequence[LoraWish]) -> None:
    """Put Stream LoRA nodes, in this order, before each sampler of an API-format `prompt`.

    Raises:
        ValueError: there is no sampler that they could be put before.
    """
    ends: dict[tuple[str, int], str] = {}
    samplers = [node for node in prompt.values() if node["class_type"] == SAMPLER]
    if loras and not samplers:
        raise ValueError(f"The workflow has no {SAMPLER}, so {LORA_OPTION.flag} cannot be used.")
    for sampler in samplers:
        source = tuple(sampler["inputs"]["pipeline"])
        if loras:
            if source not in ends:
                ends[source] = _append_chain(prompt, list(source), loras)
            sampler["inputs"]["pipeline"] = [ends[source], 0]


def _append_chain(prompt: dict[str, dict[str, Any]], source: list[Any], loras: Sequence[LoraWish]) -> str:
    """Add one node after another behind the output `source`; returns the last one's id."""
    for lora in loras:
        node_id = str(1 + max((int(key) for key in prompt if key.isdecimal()), default=0))
        inputs = {"pipeline": source, "lora": lora.name, "strength": lora.strength}
        prompt[node_id] = {"inputs": inputs, "class_type": LORA, "_meta": {"title": "Stream LoRA"}}
        source = [node_id, 0]
    return str(source[0])


def check_strengths(loras: Sequence[LoraWish], spec: Mapping[str, Any]) -> None:
    """Raise ValueError for a strength outside of `spec`, the options of the node's input."""
    for lora in loras:
        if not spec["min"] <= lora.strength <= spec["max"]:
            raise ValueError(
                f"{LORA_OPTION.flag} {lora.name} has strength {lora.strength:g}: give one from {spec['min']:g} to "
                f"{spec['max']:g}."
            )
