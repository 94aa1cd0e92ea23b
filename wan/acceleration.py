"""What makes the same computation faster on a GPU: compiled blocks, convolution weights in cuDNN's own layout."""

from __future__ import annotations

import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
from torch import nn

_VARIANTS = 64
_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def compile_transformer_blocks(transformer: WanTransformer3DModel, backend: str = "inductor") -> None:
    """Compile each block in place; all blocks share their graphs, one per picture size and length of the past.

    Args:
        transformer: prepared by `install_causal_attention`.
        backend: of torch.compile.
    """
    _allow_variants()
    for block in transformer.blocks:
        block.compile(backend=backend, dynamic=False)


def compile_decoder(vae: AutoencoderKLWan, backend: str = "inductor") -> None:
    """Compile the VAE's decoder in place: one variant each for the first, the second and every later latent frame."""
    # The forward and not the module: compiled modules share one code object, whose variants dynamo limits to 8.
    _allow_variants()
    vae.decoder.forward = torch.compile(vae.decoder.forward, backend=backend, dynamic=False)


def _allow_variants() -> None:
    """Let dynamo keep more variants of a block than its 8: sizes that users try out come on top of one another."""
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _VARIANTS)


def put_channels_last(module: nn.Module) -> None:
    """Lay convolution weights out with channels last, which cuDNN computes in; saves it a transposition per call."""
    for parameter in module.parameters():
        if parameter.ndim in _CHANNELS_LAST:
            parameter.data = parameter.data.contiguous(memory_format=_CHANNELS_LAST[parameter.ndim])
