"""Short ways for tests to load and plan the components of a Wan pipeline."""

from pathlib import Path

import torch

from streamblocks.checkpoints.component import Component
from streamblocks.ops.quantization import QuantizationPlan, QuantizationSpec
from streamblocks.wan.checkpoints.components import text_encoder_component, transformer_component, vae_component


def component_of(
    source: Path, name: str, dtype: torch.dtype, quantization: QuantizationSpec | None = None
) -> Component:
    if name == "vae":
        return vae_component(source, dtype=dtype)
    if name == "transformer":
        return transformer_component(source, dtype=dtype, quantization=quantization)
    assert name == "text_encoder"
    return text_encoder_component(source, dtype=dtype, quantization=quantization)


def load_transformer(source, *, device, dtype, quantization=None, on_tensor=None, loras=()):
    component = transformer_component(source, dtype=dtype, quantization=quantization, loras=loras)
    return component.load(device, on_tensor)


def load_vae(folder, *, device, dtype):
    return vae_component(folder, dtype=dtype).load(device)


def load_text_encoder(folder, *, device, dtype, quantization=None):
    return text_encoder_component(folder, dtype=dtype, quantization=quantization).load(device)


def plan_for(source, name, dtype, quantization) -> QuantizationPlan:
    return component_of(source, name, dtype, quantization).plan


def component_bytes(source, name, dtype, quantization=None) -> int:
    return component_of(source, name, dtype, quantization).bytes
