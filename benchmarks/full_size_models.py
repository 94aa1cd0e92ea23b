"""Wan models at full size with seeded random weights, made on their device without any checkpoint.

Speed and memory don't depend on what the weights are, but power draw does: values are random, never zeros.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import streamblocks_path  # noqa: F401
import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from torch import nn
from transformers import UMT5Config, UMT5EncoderModel

from streamblocks.checkpoints.module_loading import destination_dtype
from streamblocks.wan.checkpoints.components import keep_fp32_parts
from streamblocks.wan.transformer.joined_projections import fuse_self_attention

META = torch.device("meta")

ModuleT = TypeVar("ModuleT", bound=nn.Module)
ReplaceLinear = Callable[[str, nn.Linear], nn.Module]


@dataclass(frozen=True)
class ModelSize:
    """Configurations of the three models of a pipeline.

    Attributes:
        name: as given on the command line.
        transformer: arguments of WanTransformer3DModel.
        vae: arguments of AutoencoderKLWan.
        text: arguments of UMT5Config.
    """

    name: str
    transformer: Mapping[str, Any]
    vae: Mapping[str, Any]
    text: Mapping[str, Any]


_WAN: Mapping[str, Any] = {"patch_size": (1, 2, 2), "attention_head_dim": 128, "in_channels": 16, "out_channels": 16}
_UMT5_XXL: Mapping[str, Any] = {
    "vocab_size": 256384,
    "d_model": 4096,
    "d_kv": 64,
    "d_ff": 10240,
    "num_layers": 24,
    "num_heads": 64,
    "feed_forward_proj": "gated-gelu",
}
_FULL_VAE: Mapping[str, Any] = {"base_dim": 96, "z_dim": 16}

SIZES: Mapping[str, ModelSize] = {
    size.name: size
    for size in (
        ModelSize("14B", {**_WAN, "num_attention_heads": 40, "ffn_dim": 13824, "num_layers": 40}, _FULL_VAE, _UMT5_XXL),
        ModelSize("1.3B", {**_WAN, "num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30}, _FULL_VAE, _UMT5_XXL),
        ModelSize(
            "tiny",
            {
                **_WAN,
                "num_attention_heads": 2,
                "attention_head_dim": 32,
                "ffn_dim": 128,
                "num_layers": 2,
                "text_dim": 48,
                "freq_dim": 32,
            },
            {"base_dim": 8, "z_dim": 16, "num_res_blocks": 1},
            {**_UMT5_XXL, "vocab_size": 384, "d_model": 48, "d_kv": 16, "d_ff": 96, "num_layers": 2, "num_heads": 3},
        ),
    )
}


def build_transformer_skeleton(size: ModelSize) -> WanTransformer3DModel:
    """The transformer on the meta device, self-attention fused, its parameters in the dtypes of a bfloat16 load."""
    with META, torch.random.fork_rng(devices=[]):
        transformer = WanTransformer3DModel(**size.transformer)
    fuse_self_attention(transformer)
    return _frozen(_as_loaded(transformer, torch.bfloat16))


def build_vae_skeleton(size: ModelSize) -> AutoencoderKLWan:
    """The VAE on the meta device, in float16."""
    with META, torch.random.fork_rng(devices=[]):
        vae = AutoencoderKLWan(**size.vae)
    return _frozen(_as_loaded(vae, torch.float16))


def build_transformer(
    size: ModelSize,
    device: torch.device,
    dtype: torch.dtype,
    *,
    seed: int = 0,
    replace_linear: ReplaceLinear | None = None,
) -> WanTransformer3DModel:
    """The transformer on `device`.

    Args:
        size: which.
        device: where every parameter is made.
        dtype: of all but the parts that diffusers keeps in float32.
        seed: of the weights.
        replace_linear: called with the name and the filled layer of every linear layer, one at a time, and returns
            the layer that replaces it, so a quantized model is never held in `dtype` as a whole.
    """
    transformer = build_transformer_skeleton(size)
    keep = keep_fp32_parts(WanTransformer3DModel, dtype)
    if replace_linear is not None:
        # Names, not modules: a list of modules would keep every layer that was replaced.
        names = [name for name, layer in transformer.named_modules() if isinstance(layer, nn.Linear)]
        for name in names:
            layer = transformer.get_submodule(name)
            fill_randomly(layer, device, dtype, keep, seed=seed, prefix=name)
            _set_module(transformer, name, replace_linear(name, layer))
            del layer
    return fill_randomly(transformer, device, dtype, keep, seed=seed)


def build_vae(size: ModelSize, device: torch.device, dtype: torch.dtype, *, seed: int = 0) -> AutoencoderKLWan:
    """The VAE on `device`."""
    keep = keep_fp32_parts(AutoencoderKLWan, dtype)
    return fill_randomly(build_vae_skeleton(size), device, dtype, keep, seed=seed)


def build_text_encoder(size: ModelSize, device: torch.device, dtype: torch.dtype, *, seed: int = 0) -> UMT5EncoderModel:
    """The text encoder on `device`."""
    with META, torch.random.fork_rng(devices=[]):
        encoder = UMT5EncoderModel(UMT5Config(**size.text, dropout_rate=0.0))
    return fill_randomly(_frozen(encoder), device, dtype, keep_fp32_parts(UMT5EncoderModel, dtype), seed=seed)


@torch.no_grad()
def fill_randomly(
    module: ModuleT,
    device: torch.device,
    dtype: torch.dtype,
    keep_fp32: Collection[str],
    *,
    seed: int,
    prefix: str = "",
) -> ModuleT:
    """Make every parameter that is still on the meta device, in place; tied parameters stay tied.

    Each name has its own generator, so a model's weights don't depend on the order they are made in.
    """
    made: dict[int, nn.Parameter] = {}
    for path, owner in module.named_modules():
        for leaf, parameter in list(owner.named_parameters(recurse=False)):
            if not parameter.is_meta:
                continue
            name = ".".join(part for part in (prefix, path, leaf) if part)
            if id(parameter) not in made:
                target = destination_dtype(name, parameter.dtype, dtype, keep_fp32)
                values = _random_values(name, parameter.shape, device, target, seed)
                made[id(parameter)] = nn.Parameter(values, requires_grad=False)
            owner.register_parameter(leaf, made[id(parameter)])
    return module


def _random_values(name: str, shape: torch.Size, device: torch.device, dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Gains near 1, biases near 0, weights by fan-in: activations keep their size through norms and residuals."""
    generator = torch.Generator(device).manual_seed(zlib.crc32(f"{seed}/{name}".encode()))
    mean, std = _distribution(name, shape)
    return torch.empty(shape, device=device, dtype=dtype).normal_(mean, std, generator=generator)


def _distribution(name: str, shape: torch.Size) -> tuple[float, float]:
    leaf = name.rsplit(".", 1)[-1]
    if leaf == "gamma" or (leaf == "weight" and len(shape) == 1):
        return 1.0, 0.1
    if leaf == "bias":
        return 0.0, 0.05
    if leaf == "scale_shift_table":
        return 0.0, 0.3
    if name.startswith("shared") or "embed_tokens" in name:
        return 0.0, 1.0
    # T5 divides no attention score by sqrt(head size): smaller queries keep its attention from going one-hot.
    gain = 0.3 if "SelfAttention.q." in name else 1.0
    return 0.0, gain / math.sqrt(math.prod(shape[1:]))


def _set_module(root: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(root.get_submodule(parent), leaf, module)


def _as_loaded(module: ModuleT, dtype: torch.dtype) -> ModuleT:
    """Parameters on the meta device in the dtypes that a load as `dtype` gives them."""
    keep = keep_fp32_parts(type(module), dtype)
    for name, parameter in module.named_parameters():
        parameter.data = parameter.data.to(destination_dtype(name, parameter.dtype, dtype, keep))
    return module


def _frozen(module: ModuleT) -> ModuleT:
    module.eval()
    module.requires_grad_(False)
    return module
