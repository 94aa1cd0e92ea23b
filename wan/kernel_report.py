"""Which GPU kernels a built-in pipeline runs."""

from __future__ import annotations

import torch
from diffusers.modular_pipelines import ModularPipeline

from ..ops.attention_backends import EIGHT_BIT, FLASH3_FP8
from ..ops.fp8_linear import FP8Linear
from ..ops.kernels.kernel import KernelName
from ..ops.kernels.register import RUNS, describe_kernels
from .transformer.fused_norms import has_plain_layer_norms
from .transformer.installed_attention import library_of

NOT_ASKED_FOR = "not used here: it runs for FP8 layers with a scale per row after a GELU, in a compiled transformer"
KEYS_NOT_IN_8_BITS = "not used here: it runs where the attention backend is flash3_fp8, or 8-bit as far as that is it"
OTHER_NORMS = "not used here: this transformer's layers have other norms than the layer norms it is for"
OTHER_VAE = "not used here: diffusers' own decoder runs, this VAE's is built otherwise than the one it is for"


def report_kernels(
    pipe: ModularPipeline, device: torch.device, *, dtype: torch.dtype, vae_dtype: torch.dtype, fused_vae: bool
) -> dict[str, str]:
    """ "runs" or the reason why not, by the kernel's name.

    Args:
        pipe: the causal Wan pipeline; while its transformer is not loaded, its sizes are taken as supported.
        device: of its components.
        dtype: of the transformer.
        vae_dtype: of the VAE.
        fused_vae: whether the VAE has the decoder that `fuse_decoder` replaces.
    """
    transformer = getattr(pipe, "transformer", None)
    config = None if transformer is None else transformer.config
    told = describe_kernels(
        device,
        dtype=dtype,
        vae_dtype=vae_dtype,
        heads=config and config.num_attention_heads,
        head_dim=config and config.attention_head_dim,
    )
    if told[KernelName.NORM_SILU.value] == RUNS and not fused_vae:
        told[KernelName.NORM_SILU.value] = OTHER_VAE
    if transformer is None:
        return told
    asked = any(isinstance(module, FP8Linear) and module.gelu_kernel is not None for module in transformer.modules())
    if told[KernelName.GELU_QUANTIZATION.value] == RUNS and not asked:
        told[KernelName.GELU_QUANTIZATION.value] = NOT_ASKED_FOR
    if told[KernelName.LAYER_NORM.value] == RUNS and not all(map(has_plain_layer_norms, transformer.blocks)):
        told[KernelName.LAYER_NORM.value] = OTHER_NORMS
    if told[KernelName.ROTARY_STORE_FP8.value] == RUNS and library_of(transformer) not in (FLASH3_FP8, EIGHT_BIT):
        told[KernelName.ROTARY_STORE_FP8.value] = KEYS_NOT_IN_8_BITS
    return told
