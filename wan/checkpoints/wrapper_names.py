"""What training code and other programs put around Wan's parameter names, and how it is taken off."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from ...checkpoints.checkpoint_files import CheckpointError
from ...checkpoints.row_sources import RowSource

ANCHOR = "patch_embedding.weight"
# Before Wan's own names, in any number and order. `net` is a part of diffusers' names, so only here is it a wrapper.
_PREFIX = re.compile(r"(?:(?:generator_ema|generator|model|net|state_dict|diffusion_model|base_model|transformer)\.)*")
# Torch's DDP, FSDP, activation checkpointing and torch.compile put these inside names, wherever they wrap a module.
_WRAPPERS = re.compile(r"(?<![^.])(?:module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_AVERAGED = "generator_ema."
# Other models, and what belongs to training, in all-in-one and training files.
_OTHER_MODELS = (
    "generator.",
    "generator_ema.",
    "critic.",
    "fake_score.",
    "real_score.",
    "discriminator.",
    "optimizer",
    "generator_optimizer",
    "critic_optimizer",
    "lr_scheduler",
    "scheduler",
    "first_stage_model.",
    "cond_stage_model.",
    "text_encoder",
    "vae.",
)
# The four namings of LoRA files: PEFT, kohya and musubi, differences, and the other low-rank kinds.
_LORA = re.compile(
    r"(?:^|[._])lora_(?:A|B|down|up|unet|te\d?|embedding_A|embedding_B)(?:[._]|$)|\.lora\.(?:up|down)\."
    r"|\.(?:diff|diff_b|dora_scale|hada_w\d_\w|lokr_w\d(?:_\w)?)$"
)


def find_prefix(path: Path, keys: Iterable[str], *, averaged: bool = True) -> str:
    """What stands before Wan's names in the file `path`, wrappers inside names left out.

    Args:
        path: for messages.
        keys: all names in the file.
        averaged: of a file with both, choose the exponential moving average rather than the trained weights.

    Raises:
        CheckpointError: there is no transformer among `keys`, more than one, or a LoRA.
    """
    names = list(keys)
    lora = next((key for key in names if _LORA.search(key)), None)
    found = [_WRAPPERS.sub("", key).removesuffix(ANCHOR) for key in names if key.endswith(ANCHOR)]
    prefixes = sorted({prefix for prefix in found if _PREFIX.fullmatch(prefix)})
    if lora is not None and prefixes:
        raise CheckpointError(
            f"{path} holds a transformer and a LoRA that is not merged into it ({lora}): give the transformer without "
            "it, and the LoRA as a file of its own."
        )
    if lora is not None:
        raise CheckpointError(
            f"{path} holds a LoRA ({lora}) and no transformer: choose the transformer it was made for as the model, "
            "and the LoRA on top of it."
        )
    candidates = [prefix for prefix in prefixes if (_AVERAGED in prefix) == averaged] or prefixes
    if not candidates:
        raise CheckpointError(
            f"{path} holds no Wan transformer ({ANCHOR} is absent): give a transformer with Wan's or "
            "diffusers' names, not a VAE, a text encoder, a LoRA or another model."
        )
    if len(candidates) > 1:
        raise CheckpointError(
            f"{path} holds several transformers, under {', '.join(map(repr, candidates))}: give a file with one."
        )
    return candidates[0]


def strip_wrappers(path: Path, stored: Mapping[str, RowSource], prefix: str) -> dict[str, RowSource]:
    """The tensors under `prefix`, without it; other models dropped, unknown names kept to be reported.

    Raises CheckpointError where two tensors come to the same name.
    """
    kept: dict[str, RowSource] = {}
    for key, source in stored.items():
        plain = _WRAPPERS.sub("", key)
        if plain.startswith(prefix):
            name = plain.removeprefix(prefix)
        elif plain.startswith((*_OTHER_MODELS, *(f"model.{name}" for name in _OTHER_MODELS))):
            continue
        else:
            name = plain
        if name in kept:
            raise CheckpointError(f"{path} holds {name} twice, as {kept[name].key} and as {key}: give a file with one.")
        kept[name] = source
    return kept
