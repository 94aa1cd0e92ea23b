"""What makes the same computation faster on a GPU: compiled blocks, a VAE in cuDNN's own layout."""

from __future__ import annotations

import math

import torch
from diffusers.models.activations import GELU
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
from torch import nn

from ..ops.fp8_linear import FP8Linear
from ..ops.triton_kernels import runs_kernel_on
from .fused_decoder import fuse_decoder
from .streaming_vae import encode_pixel_frame, vae_device

_VARIANTS = 64
_TWO_ROOT_2_OVER_PI = 2.0 * math.sqrt(2.0 / math.pi)
_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def compile_transformer_blocks(transformer: WanTransformer3DModel, backend: str = "inductor") -> None:
    """Compile each block in place; all blocks share their graphs, one per picture size and length of the past.

    Args:
        transformer: prepared by `install_causal_attention`.
        backend: of torch.compile.
    """
    _allow_variants()
    for block in transformer.blocks:
        activation, second = block.ffn.net[0], block.ffn.net[-1]
        if isinstance(activation, GELU) and activation.approximate == "tanh":
            fused = isinstance(second, FP8Linear) and second.take_gelu()
            activation.gelu = _leave if fused else gelu_by_sigmoid
        block.compile(backend=backend, dynamic=False)


def gelu_by_sigmoid(x: torch.Tensor) -> torch.Tensor:
    """GELU in its tanh approximation, written as x * sigmoid(2 u) with u = sqrt(2 / pi) * (x + 0.044715 x^3).

    The same function (Hendrycks and Gimpel 2016, "Gaussian Error Linear Units"; 1 + tanh(u) = 2 sigmoid(2 u)). A
    compiled sigmoid is one exponential and one division, a compiled tanh two branches of some forty operations: on an
    H200 the tanh and not memory sets the time. For compiled code, which computes it in float32.
    """
    return x * torch.sigmoid(x * (_TWO_ROOT_2_OVER_PI + _TWO_ROOT_2_OVER_PI * 0.044715 * x * x))


def _leave(x: torch.Tensor) -> torch.Tensor:
    """GELU is applied by the layer behind it, while it quantizes its input."""
    return x


def _allow_variants() -> None:
    """Let dynamo keep more variants of a block than its 8: sizes that users try out come on top of one another."""
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _VARIANTS)


def speed_up_vae(vae: AutoencoderKLWan) -> None:
    """Lay a VAE on CUDA out for cuDNN and, where Triton is installed, have it decode with fused norms."""
    device = vae_device(vae)
    if device.type != "cuda":
        return
    _put_channels_last(vae)
    if runs_kernel_on(device):
        fuse_decoder(vae)
        # The kernel's variants for the encoder are compiled here, not in the third block of a running stream.
        encode_pixel_frame(vae, torch.zeros((1, 3, 1, 64, 64), device=device))


def _put_channels_last(module: nn.Module) -> None:
    """Lay convolution weights out with channels last, which cuDNN computes in; saves it a transposition per call."""
    for parameter in module.parameters():
        if parameter.ndim in _CHANNELS_LAST:
            parameter.data = parameter.data.contiguous(memory_format=_CHANNELS_LAST[parameter.ndim])
