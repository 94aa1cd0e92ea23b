"""A rehearsal of a stream on the meta device: what it allocates beside the weights, without weights or data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
from diffusers.modular_pipelines.modular_pipeline import PipelineState
from torch.overrides import TorchFunctionMode

from .steps.causal_wan_blocks import make_causal_wan_pipeline
from .steps.text_step import DEFAULT_TEXT_TOKENS
from .transformer.attention import install_causal_attention
from .transformer.joined_projections import fuse_self_attention

META = torch.device("meta")


class _MetaStandIns(TorchFunctionMode):
    """Replaces what has no answer on the meta device, or another one than on a real device."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # noqa: ANN401
        kwargs = kwargs or {}
        if func is torch.nn.functional.scaled_dot_product_attention:
            # On meta it falls back to the formula and holds the scores, which fused kernels never do.
            return torch.empty_like(kwargs.get("query", args[0] if args else None))
        if func is torch.Tensor.cpu:
            return torch.empty_like(args[0])
        return func(*args, **kwargs)


class MetaRehearsal:
    """A pipeline whose weights have shapes only.

    Args:
        transformer_config: of `WanTransformer3DModel`.
        vae_config: of `AutoencoderKLWan`.
        dtype: of the transformer.
        vae_dtype: of the VAE.
        kept_fp32: parts of parameter names of the transformer that stay float32.
    """

    def __init__(
        self,
        transformer_config: Mapping[str, Any],
        vae_config: Mapping[str, Any],
        *,
        dtype: torch.dtype,
        vae_dtype: torch.dtype,
        kept_fp32: frozenset[str],
    ) -> None:
        with META:
            transformer = WanTransformer3DModel.from_config(dict(transformer_config)).requires_grad_(False)
            vae = AutoencoderKLWan.from_config(dict(vae_config)).requires_grad_(False).to(vae_dtype)
        fuse_self_attention(transformer)
        _cast(transformer, dtype, kept_fp32)
        install_causal_attention(transformer)
        self._pipe = make_causal_wan_pipeline()
        self._pipe.update_components(transformer=transformer, vae=vae)
        text_dim = transformer_config["text_dim"]
        self._prompt_embeds = torch.empty((1, DEFAULT_TEXT_TOKENS, text_dim), dtype=dtype, device=META)

    def run(self, inputs: Mapping[str, Any], blocks: int = 3) -> None:
        """Make blocks; from the third on a stream repeats itself.

        Args:
            inputs: of the pipeline call: sizes, policy, frames; two denoising steps are as good as many.
            blocks: how many.
        """
        state = PipelineState()
        state.values |= {"prompt_embeds": self._prompt_embeds, "encoded_prompt": "", "prompt": "", **inputs}
        steps = [block for name, block in self._pipe.blocks.sub_blocks.items() if name != "text_encoder"]
        with torch.no_grad(), _MetaStandIns():
            for index in range(blocks):
                state.set("block_idx", index)
                for step in steps:
                    step(self._pipe, state)
                for consumed in ("videos", "latents"):
                    state.values.pop(consumed)


def _cast(model: torch.nn.Module, dtype: torch.dtype, kept: frozenset[str]) -> None:
    for name, parameter in model.named_parameters():
        if not any(part in kept for part in name.split(".")):
            parameter.data = parameter.data.to(dtype)
