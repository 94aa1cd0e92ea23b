"""The twins of users' single files, and the values that ComfyUI's own classes compute with them.

Described in ../shared/layouts/README.md, from where they were copied.
"""

import json
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file

LAYOUTS = Path(__file__).resolve().parent / "data/layouts"
VAE = LAYOUTS / "comfy_wan_vae.safetensors"
VAE_22 = LAYOUTS / "comfy_wan22_vae.safetensors"
UMT5 = LAYOUTS / "comfy_umt5.safetensors"
UMT5_FP8 = LAYOUTS / "comfy_umt5_fp8_scaled.safetensors"
UMT5_WAN_NAMES = LAYOUTS / "wan_umt5_original_names.safetensors"
TRANSFORMER = LAYOUTS / "causal_wan.safetensors"


def vae_values(path: Path = VAE) -> dict[str, torch.Tensor]:
    return load_file(path.with_name(f"{path.stem}_values.safetensors"))


def umt5_values() -> tuple[list[str], dict[str, torch.Tensor]]:
    path = LAYOUTS / "umt5_values.safetensors"
    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()["prompts"]), load_file(path)


def users_files(folder: Path) -> dict[str, Path]:
    """Files by their places in `models/`, named as published; the transformer's is a training checkpoint's `.pt`."""
    checkpoint = folder / "self_forcing_dmd.pt"
    torch.save({"generator_ema": load_file(TRANSFORMER)}, checkpoint)
    return {
        "diffusion_models/self_forcing_dmd.pt": checkpoint,
        "vae/wan_2.1_vae.safetensors": VAE,
        "text_encoders/umt5_xxl_fp8_e4m3fn_scaled.safetensors": UMT5_FP8,
    }


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())
