"""LoRA files: which layers they name, and the changes they make to the tensors of a model.

Everything is decided from headers. Names in use, with whatever a trainer puts before and behind a layer's name, are
those that PEFT, diffusers, kohya's scripts and LyCORIS write, and that ComfyUI's `comfy/lora.py` reads.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import torch

from .checkpoint_files import CheckpointError
from .checkpoint_reading import read_checkpoint
from .lora_choice import LoraChoice, LoraMatch
from .lora_rows import DecomposedRows, DifferenceRows, LowRankPair, LowRankRows, has_magnitude_per_row
from .row_sources import RowSource, elements, row_count

UP, DOWN, ALPHA, MAGNITUDE, DIFFERENCE, BIAS_DIFFERENCE = "up", "down", "alpha", "dora_scale", "diff", "diff_b"
# What stands behind a layer's name, and what it is; `lora_A` may be followed by the name of PEFT's adapter.
_PARTS = {
    r"\.lora_A(\.default)?(\.weight)?": DOWN,
    r"\.lora_B(\.default)?(\.weight)?": UP,
    r"\.lora_down\.weight|[._]lora\.down\.weight|\.lora_linear_layer\.down\.weight": DOWN,
    r"\.lora_up\.weight|[._]lora\.up\.weight|\.lora_linear_layer\.up\.weight": UP,
    r"\.alpha": ALPHA,
    r"\.dora_scale": MAGNITUDE,
    r"\.diff|\.w_norm": DIFFERENCE,
    r"\.diff_b|\.b_norm": BIAS_DIFFERENCE,
}
_PART = re.compile("|".join(f"(?P<p{index}>{pattern})$" for index, pattern in enumerate(_PARTS)))
_PART_NAMES = tuple(_PARTS.values())
# Parts of other adapters, and of LoRA as it is not read here.
_OTHER_PART = re.compile(
    r"\.(hada_\w+|lokr_\w+|oft_\w+|boft_\w+|[ab][12]\.weight|lora_mid\.weight|lora_magnitude_vector(\.\w+)*|set_weight|"
    r"reshape_weight|lora_[AB](\.\w+)?\.bias|lora_embedding_\w+)$"
)
_WRAPPERS = re.compile(r"(?:^|(?<=\.))(?:module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_DOTTED_PREFIX = re.compile(
    r"(?:(?:base_model|model|diffusion_model|transformer|unet|generator_ema|generator|generator_lora|net)\.)*"
)
_FLAT_PREFIX = re.compile(r"(?:lora_unet|lora_transformer|lycoris)_+")


@dataclass(frozen=True)
class LoraFile:
    """What a LoRA file holds.

    Attributes:
        path: the file.
        layers: by the layer's name with underscores for dots, without what trainers put before it: its parts.
        others: keys that are no part of a LoRA.
    """

    path: Path
    layers: Mapping[str, Mapping[str, RowSource]]
    others: tuple[str, ...] = ()


def flat_name(name: str) -> str:
    """A layer's name as LoRA files are compared by: kohya's have underscores where others have dots."""
    return name.replace(".", "_")


def read_lora(path: Path) -> LoraFile:
    """Read the header of a LoRA file.

    Raises CheckpointError for a file that cannot be read, holds no LoRA (a whole model, for example), holds adapters of
    another kind, names a part twice, or has one matrix of a pair only.
    """
    layers: dict[str, dict[str, RowSource]] = {}
    others = []
    for key, tensor in read_checkpoint(path).tensors.items():
        match = _PART.search(key)
        if match is None:
            if _OTHER_PART.search(key):
                raise CheckpointError(
                    f"{path} holds {key}, a kind of adapter that is not read here: give a LoRA of lora_A and lora_B, "
                    "or of lora_down and lora_up."
                )
            others.append(key)
            continue
        part = next(_PART_NAMES[index] for index in range(len(_PARTS)) if match[f"p{index}"] is not None)
        parts = layers.setdefault(_layer_name(key[: match.start()]), {})
        if part in parts:
            raise CheckpointError(f"{path} holds both {parts[part].key} and {key}: keep one of the two.")
        parts[part] = tensor
    if not layers:
        raise CheckpointError(
            f"{path} holds no LoRA, its names are like {next(iter(others), 'none')}: choose a LoRA file here, and a "
            "whole model in Load Streaming Pipeline."
        )
    _check_pairs(path, layers)
    return LoraFile(path, MappingProxyType(layers), tuple(others))


def change_sources(
    sources: Mapping[str, RowSource], lora: LoraFile, choice: LoraChoice, names: Mapping[str, str], model: Path
) -> tuple[dict[str, RowSource], LoraMatch]:
    """Put a LoRA on the tensors of a model.

    Args:
        sources: of the model, by parameter name.
        lora: the file of `choice`.
        choice: with strength 0 the tensors stay as they are, and the LoRA is checked all the same.
        names: flat names that LoRA files may call a layer by, to its name among `sources` without `.weight`.
        model: for messages.

    Returns:
        The tensors, and what of the LoRA was found among them.

    Raises:
        CheckpointError: no layer of the LoRA is one of the model, or it belongs to a model of another size.
    """
    changed = dict(sources)
    matched, unmatched = 0, []
    for name, parts in lora.layers.items():
        layer = names.get(name)
        if layer is None:
            unmatched.append(next(iter(parts.values())).key)
            continue
        matched += 1
        for parameter, source in _changes(lora, layer, parts, changed, choice.strength, model):
            if choice.strength != 0:
                changed[parameter] = source
    if not matched:
        raise CheckpointError(
            f"{lora.path} matches no layer of {model}, its names are like {unmatched[0]}: it belongs to another model, "
            "choose a LoRA that was made for this one."
        )
    _refuse_absent_layers(lora, names, model)
    return changed, LoraMatch(choice, matched, (*unmatched, *lora.others))


def _layer_name(name: str) -> str:
    plain = _WRAPPERS.sub("", name)
    plain = plain[_prefix_length(_DOTTED_PREFIX, plain) :]
    return flat_name(plain[_prefix_length(_FLAT_PREFIX, plain) :])


def _prefix_length(prefix: re.Pattern[str], name: str) -> int:
    match = prefix.match(name)
    return 0 if match is None else match.end()


def _check_pairs(path: Path, layers: Mapping[str, Mapping[str, RowSource]]) -> None:
    for parts in layers.values():
        if (UP in parts) != (DOWN in parts):
            key = parts[UP if UP in parts else DOWN].key
            raise CheckpointError(f"{path} holds {key} without the other matrix of its pair: download the LoRA again.")
        for part in (ALPHA, MAGNITUDE):
            if part in parts and UP not in parts:
                raise CheckpointError(f"{path} holds {parts[part].key} without its matrices: download the LoRA again.")


def _refuse_absent_layers(lora: LoraFile, names: Mapping[str, str], model: Path) -> None:
    """A name that only differs from the model's by its numbers is a layer that a deeper model has."""
    patterns = {re.sub(r"\d+", "#", name) for name in names}
    for name, parts in lora.layers.items():
        if name not in names and re.sub(r"\d+", "#", name) in patterns:
            raise CheckpointError(
                f"{lora.path} changes {next(iter(parts.values())).key}, a layer that {model} does not have: the LoRA "
                "belongs to a model of another size, choose one made for this size."
            )


def _changes(
    lora: LoraFile,
    layer: str,
    parts: Mapping[str, RowSource],
    sources: Mapping[str, RowSource],
    strength: float,
    model: Path,
) -> Iterable[tuple[str, RowSource]]:
    """Each parameter that one layer of the LoRA changes, changed."""
    weight = f"{layer}.weight" if f"{layer}.weight" in sources else layer
    source = sources.get(weight)
    for part, tensor in parts.items():
        if not tensor.dtype.is_floating_point:
            raise CheckpointError(f"{lora.path} stores {part} {tensor.key} as {tensor.dtype}: give a LoRA in 16 bits.")
    if UP in parts and source is not None:
        _check_pair_shape(lora, parts, source, model)
        pair = LowRankPair(parts[UP], parts[DOWN], parts.get(ALPHA))
        magnitude = parts.get(MAGNITUDE)
        if magnitude is None:
            source = LowRankRows(source, strength, pair)
        else:
            source = DecomposedRows(source, strength, pair, magnitude)
        yield weight, source
    if DIFFERENCE in parts and source is not None:
        _check_shape(lora, parts[DIFFERENCE], source, model)
        yield weight, DifferenceRows(source, strength, parts[DIFFERENCE])
    if BIAS_DIFFERENCE in parts:
        bias = sources.get(f"{layer}.bias")
        if bias is None:
            raise CheckpointError(
                f"{lora.path} changes {parts[BIAS_DIFFERENCE].key}, and that layer of {model} has no bias: choose a "
                "LoRA that was made for this model."
            )
        _check_shape(lora, parts[BIAS_DIFFERENCE], bias, model)
        yield f"{layer}.bias", DifferenceRows(bias, strength, parts[BIAS_DIFFERENCE])


def _check_pair_shape(lora: LoraFile, parts: Mapping[str, RowSource], weight: RowSource, model: Path) -> None:
    up, down = parts[UP], parts[DOWN]
    rank, columns = row_count(down), torch.Size(weight.shape[1:]).numel()
    fits = len(up.shape) > 1 and len(down.shape) > 1 and len(weight.shape) > 1 and rank > 0
    fits = fits and up.shape[0] == weight.shape[0] and elements(up) == up.shape[0] * rank
    if not fits or elements(down) != rank * columns:
        raise _another_size(lora, f"{up.key} {list(up.shape)} and {down.key} {list(down.shape)}", weight, model)
    if ALPHA in parts and elements(parts[ALPHA]) != 1:
        raise _another_size(lora, f"{parts[ALPHA].key} {list(parts[ALPHA].shape)}", weight, model)
    magnitude = parts.get(MAGNITUDE)
    if magnitude is not None:
        per_row = has_magnitude_per_row(magnitude.shape, weight.shape)
        if elements(magnitude) != weight.shape[0 if per_row else 1]:
            raise _another_size(lora, f"{magnitude.key} {list(magnitude.shape)}", weight, model)


def _check_shape(lora: LoraFile, difference: RowSource, source: RowSource, model: Path) -> None:
    if difference.shape != source.shape:
        raise _another_size(lora, f"{difference.key} {list(difference.shape)}", source, model)


def _another_size(lora: LoraFile, what: str, source: RowSource, model: Path) -> CheckpointError:
    return CheckpointError(
        f"{lora.path} has {what}, which does not go with {source.key} {list(source.shape)} of {model}: the LoRA "
        "belongs to a model of another size, choose one made for this size."
    )
