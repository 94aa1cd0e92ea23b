"""Repositories of strangers without code of their own, hostile in any of their configs; and the list of consents."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path
from random import Random
from typing import Any

import streamblocks_path  # noqa: F401
import torch
from fuzz_mutations import change_bytes, change_json
from fuzz_target import Target, is_sentence, names_its_file

from streamblocks.stream.code_consent import Consent, allow_code, read_allowed_code
from streamblocks.stream.code_files import CodeFile, RepositoryCode
from streamblocks.stream.foreign_loading import load_foreign_pipeline
from streamblocks.stream.recipe import REPOSITORY_BLOCKS, Recipe

_COMPONENTS = {
    "scheduler": ("diffusers", "FlowMatchEulerDiscreteScheduler"),
    "transformer": ("diffusers", "WanTransformer3DModel"),
    "vae": ("diffusers", "AutoencoderKLWan"),
}
_SMALL_TRANSFORMER = {
    "_class_name": "WanTransformer3DModel", "attention_head_dim": 12, "cross_attn_norm": True, "eps": 1e-06,
    "ffn_dim": 16, "freq_dim": 16, "in_channels": 4, "num_attention_heads": 1, "num_layers": 1, "out_channels": 4,
    "patch_size": [1, 2, 2], "qk_norm": "rms_norm_across_heads", "rope_max_seq_len": 32, "text_dim": 8,
}  # fmt: skip
_SMALL_VAE = {
    "_class_name": "AutoencoderKLWan", "base_dim": 4, "z_dim": 4, "dim_mult": [1, 1], "num_res_blocks": 1,
    "temperal_downsample": [False], "latents_mean": [0.0] * 4, "latents_std": [1.0] * 4,
}  # fmt: skip
_SCHEDULER = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 3.0}
_CONSENT = RepositoryCode("owner/name", "0" * 40, (CodeFile("blocks.py", b"a = 1\n"),))


def _index(folder: Path) -> dict[str, Any]:
    index: dict[str, Any] = {"_class_name": "WanModularPipeline", "_blocks_class_name": "WanBlocks"}
    for name, hint in _COMPONENTS.items():
        place = {"pretrained_model_name_or_path": str(folder), "subfolder": name, "variant": None, "revision": None}
        index[name] = [*hint, {**place, "type_hint": list(hint)}]
    return index


def _configs(folder: Path) -> dict[str, dict[str, Any]]:
    """The good ones, by place."""
    return {
        "modular_model_index.json": _index(folder),
        "model_index.json": {"_class_name": "WanPipeline", **{name: list(hint) for name, hint in _COMPONENTS.items()}},
        "modular_config.json": {"_class_name": "Blocks", "auto_map": {"ModularPipelineBlocks": "blocks.Blocks"}},
        "scheduler/scheduler_config.json": _SCHEDULER,
        "transformer/config.json": _SMALL_TRANSFORMER,
        "vae/config.json": _SMALL_VAE,
    }


def _prepare(folder: Path) -> None:
    """Weights of the small models, as diffusers writes them."""
    from diffusers import AutoencoderKLWan, WanTransformer3DModel

    for name, kind, config in (
        ("transformer", WanTransformer3DModel, _SMALL_TRANSFORMER),
        ("vae", AutoencoderKLWan, _SMALL_VAE),
    ):
        sizes = {key: value for key, value in config.items() if not key.startswith("_")}
        kind(**sizes).save_pretrained(folder / name)
    (folder / "scheduler").mkdir()


def _write(random: Random, folder: Path) -> None:
    """All configs good but one; in some repositories the plain index is the only one."""
    configs = _configs(folder)
    kinds = ("modular_model_index.json", "model_index.json", "modular_config.json", *list(configs)[3:])
    changed = random.choice(kinds)
    left_out = {"modular_config.json", "model_index.json"} - {changed}
    if changed == "model_index.json" or random.randrange(8) == 0:
        left_out.add("modular_model_index.json")
        left_out.discard("model_index.json")
    for place, value in configs.items():
        path = folder / place
        if place in left_out:
            path.unlink(missing_ok=True)
            continue
        content = json.dumps(value).encode()
        if place == changed:
            content = change_json(random, value).encode("utf-8", "surrogatepass")
            if random.randrange(12) == 0:
                content = change_bytes(random, content)
        path.write_bytes(content)


def _load(folder: Path) -> object:
    recipe = Recipe(str(folder), blocks=REPOSITORY_BLOCKS)
    with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
        pipe, imported = load_foreign_pipeline(recipe, dtype=torch.bfloat16, vae_dtype=torch.bfloat16)
    return pipe, imported


def _names_the_repository(error: Exception, folder: Path) -> bool:
    from streamblocks.stream.code_consent import CodeNotAllowedError

    kinds = (CodeNotAllowedError,)
    return names_its_file(error, folder) or (
        type(error) in kinds and str(folder) in str(error) and is_sentence(str(error))
    )


class _ProblemError(Exception):
    """The list's problem."""


def _write_list(random: Random, folder: Path) -> None:
    path = folder / "allowed_code.json"
    path.unlink(missing_ok=True)
    allow_code(path, _CONSENT)
    content = change_json(random, json.loads(path.read_text())).encode("utf-8", "surrogatepass")
    path.write_bytes(change_bytes(random, content) if random.randrange(4) == 0 else content)


def _read_list(folder: Path) -> object:
    """Consents that stand in the list are those that were given, or none of this code's."""
    allowed = read_allowed_code(folder / "allowed_code.json")
    if allowed.problem:
        raise _ProblemError(f"{allowed.problem}.")
    if any(not isinstance(one, Consent) or len(one.digest) > 2**20 for one in allowed.consents):
        raise AssertionError("what is no consent")
    return allowed.admits(_CONSENT)


def _names_the_list(error: Exception, folder: Path) -> bool:
    return isinstance(error, _ProblemError) and str(folder) in str(error) and is_sentence(str(error))


def foreign_targets() -> list[Target]:
    """Of repositories, and of what the user allowed."""
    return [
        Target("foreign configs", 2, _write, _load, _names_the_repository, _prepare),
        Target("allowed code", 5, _write_list, _read_list, _names_the_list),
    ]
