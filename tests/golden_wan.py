"""The makers' tiny causal Wan: its weights in diffusers' names, and access to its reference values."""

from pathlib import Path

import torch
from diffusers import WanTransformer3DModel
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers
from safetensors.torch import load_file

from streamblocks.wan.transformer.installed_attention import install_causal_attention

DATA = Path(__file__).parent / "data"


def load_golden() -> dict[str, torch.Tensor]:
    return load_file(DATA / "causal_wan_tiny.safetensors")


def build_golden_transformer(golden: dict[str, torch.Tensor], *, causal: bool = True) -> WanTransformer3DModel:
    model = WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=32,
        text_dim=48,
        freq_dim=32,
        ffn_dim=128,
        num_layers=2,
    )
    weights = {k.removeprefix("weights/"): v for k, v in golden.items() if k.startswith("weights/")}
    model.load_state_dict(convert_wan_transformer_to_diffusers(weights), strict=True)
    model.eval().requires_grad_(False)
    if causal:
        install_causal_attention(model)
    return model


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return ((actual - expected).norm() / expected.norm()).item()
