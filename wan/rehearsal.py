"""A rehearsal of a stream on the meta device: it measures what a stream allocates besides weights, without data."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
from diffusers.modular_pipelines.modular_pipeline import PipelineState
from torch.overrides import TorchFunctionMode

from ..checkpoints.component import Component
from ..families.model_family import AttentionChoice, LatentGeometry
from ..memory.peak_meter import PeakMeter
from ..ops import library_attention
from ..ops.attention_backends import FLASH3, FLASH3_FP8, LIBRARY_BACKENDS
from ..ops.block_masks import BlockCausalShape, BlockMaskCache
from .checkpoints.config_bounds import transformer_arguments, vae_arguments
from .steps.causal_wan_blocks import make_causal_wan_pipeline
from .steps.context_policies import find_packing, frame_cache_length
from .steps.text_step import DEFAULT_TEXT_TOKENS
from .transformer.causal_transformer import allocate_kv_cache, weight_dtype
from .transformer.head_scaled_kv_cache import HeadScaledKVCache
from .transformer.installed_attention import causal_attention_of, install_causal_attention
from .transformer.joined_projections import fuse_self_attention
from .vae.streaming_vae import vae_dtype

META = torch.device("meta")
# All layers have equal activations, so two layers are rehearsed and the caches of the others are added.
_REHEARSED_LAYERS = 2
# Bytes per score in backends that materialise the whole matrix: scores, weights and casts between them. Measured at up
# to 4,680 x 9,360 scores: eager flex attention in BF16 on an H100 (torch 2.11) 13.1 to 13.5; `_native_math` there
# 9.3 to 9.8, in float32 on a CPU 8.1.
_BYTES_PER_SCORE = {"flex": 14, "_native_math": 10}
# Bytes per number of keys while 8-bit attention quantizes them in eager code: two float32 copies and the 8 bits.
# Compiled, only queries, keys and values in 8 bits.
_EAGER_EIGHT_BITS, _COMPILED_EIGHT_BITS = 9, 3
# Measured with `PeakMeter` on UMT5 (transformers 5.23): bias, scores, float32 softmax and its cast, per score.
_BYTES_PER_TEXT_SCORE = 18


def rehearse_streaming_bytes(
    transformer: Component,
    vae: Component,
    geometry: LatentGeometry,
    inputs: Mapping[str, Any],
    attention: AttentionChoice,
    decoder: Component | None = None,
) -> int:
    """Bytes of a stream's caches and activations at their largest; see `ModelFamily.streaming_bytes`."""
    config = dict(transformer.config)
    layers = config["num_layers"]
    rehearsed = min(layers, _REHEARSED_LAYERS)
    rehearsal = MetaRehearsal(
        config | {"num_layers": rehearsed},
        vae.config,
        dtype=transformer.dtype,
        vae_dtype=vae.dtype,
        kept_fp32=transformer.keep_fp32,
        attention=attention,
        decoder=decoder,
    )
    with PeakMeter(meta=True) as meter:
        rehearsal.run(inputs)
    width = config["num_attention_heads"] * config["attention_head_dim"]
    text_bytes = 2 * DEFAULT_TEXT_TOKENS * width * transformer.dtype.itemsize
    return meter.peak_bytes + (layers - rehearsed) * (rehearsal.kv_layer_bytes + text_bytes)


def text_encoding_bytes(text_encoder: Component) -> int:
    """Bytes of UMT5's activations at their largest, for a prompt of full length."""
    config = text_encoder.config
    scores = config["num_heads"] * DEFAULT_TEXT_TOKENS**2
    hidden = DEFAULT_TEXT_TOKENS * (4 * config["d_model"] + 3 * config["d_ff"])
    return _BYTES_PER_TEXT_SCORE * scores + hidden * text_encoder.dtype.itemsize


def bytes_per_score(attention: AttentionChoice) -> int:
    """Bytes that one attention call holds per score; 0 for kernels that never materialise the scores."""
    # Compiled flex attention is one fused kernel.
    fused = attention.compiled and attention.backend == "flex"
    return 0 if fused else _BYTES_PER_SCORE.get(attention.backend, 0)


def bytes_per_key_number(attention: AttentionChoice) -> int:
    """Bytes that one attention call holds per number of its keys, for copies in 8 bits."""
    if attention.backend not in LIBRARY_BACKENDS or attention.backend == FLASH3:
        return 0
    return _COMPILED_EIGHT_BITS if attention.compiled else _EAGER_EIGHT_BITS


@dataclass
class _MetaStandIns(TorchFunctionMode):
    """Replaces calls that fail on the meta device or behave differently there.

    Attributes:
        score_bytes: held per score of an attention call, while it runs.
        key_bytes: held per number of its keys.
    """

    score_bytes: int
    key_bytes: int

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # noqa: ANN401
        kwargs = kwargs or {}
        if func is torch.nn.functional.scaled_dot_product_attention:
            return self._attend(*args, **kwargs)
        if func is torch.Tensor.cpu:
            return torch.empty_like(args[0])
        return func(*args, **kwargs)

    def _attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:  # noqa: ANN401
        # On meta, attention falls back to the formula and materialises the scores; fused kernels never do.
        if self.key_bytes:
            torch.empty((*key.shape, self.key_bytes), dtype=torch.uint8, device=META)
        if self.score_bytes:
            shape = (*query.shape[:-1], key.shape[-2], self.score_bytes)
            torch.empty(shape, dtype=torch.uint8, device=META)
        return torch.empty_like(query)


class _NoBlockMasks(BlockMaskCache):
    """Gives a mask of one number: real masks are small, and the rehearsal does not compute attention."""

    def block_causal(self, shape: BlockCausalShape) -> Any:  # noqa: ANN401
        return torch.empty((1, 1, 1, 1), device=META)


class MetaRehearsal:
    """A pipeline whose weights have shapes but no values.

    Args:
        transformer_config: of `WanTransformer3DModel`.
        vae_config: of `AutoencoderKLWan`.
        dtype: of the transformer.
        vae_dtype: of the VAE.
        kept_fp32: parts of parameter names of the transformer that stay float32.
        attention: how it is computed.
        decoder: in the VAE's place; None for the VAE.

    Attributes:
        kv_layer_bytes: of the KV cache of one layer, once it has run.
    """

    kv_layer_bytes = 0

    def __init__(
        self,
        transformer_config: Mapping[str, Any],
        vae_config: Mapping[str, Any],
        *,
        dtype: torch.dtype,
        vae_dtype: torch.dtype,
        kept_fp32: frozenset[str],
        attention: AttentionChoice,
        decoder: Component | None = None,
    ) -> None:
        with META:
            transformer = WanTransformer3DModel.from_config(transformer_arguments(transformer_config)).requires_grad_(
                False
            )
            vae = AutoencoderKLWan.from_config(vae_arguments(vae_config)).requires_grad_(False).to(vae_dtype)
        fuse_self_attention(transformer)
        _cast(transformer, dtype, kept_fp32)
        causal = install_causal_attention(transformer)
        if attention.backend == "flex":
            causal.takes_block_masks, causal.block_masks = True, _NoBlockMasks()
        self._attention = attention
        self._pipe = make_causal_wan_pipeline()
        self._pipe.update_components(transformer=transformer, vae=vae)
        if decoder is not None:
            with META:
                in_its_place = decoder.build(decoder.config).requires_grad_(False).to(decoder.dtype)
            self._pipe.update_components(decoder=in_its_place)
        text_dim = transformer_config["text_dim"]
        self._prompt_embeds = torch.empty((1, DEFAULT_TEXT_TOKENS, text_dim), dtype=dtype, device=META)

    def run(self, inputs: Mapping[str, Any]) -> None:
        """Make two blocks of a stream whose context window is full and slides; all later blocks allocate the same.

        Args:
            inputs: of the pipeline call: sizes, policy, frames; two denoising steps reach the same peak as more.
        """
        state = PipelineState()
        state.values |= {"prompt_embeds": self._prompt_embeds, "encoded_prompt": "", "prompt": "", **inputs}
        steps = [block for name, block in self._pipe.blocks.sub_blocks.items() if name != "text_encoder"]
        past = self._long_past(inputs)
        # Keys that are in 8 bits already are quantized in no call.
        in_8_bits = isinstance(past["kv_cache"], HeadScaledKVCache)
        key_bytes = 0 if in_8_bits else bytes_per_key_number(self._attention)
        with torch.no_grad(), _MetaStandIns(bytes_per_score(self._attention), key_bytes):
            state.values |= past
            del past
            for _ in range(2):
                if inputs.get("video_given"):
                    state.values["input_pictures"] = self._input_pictures(inputs)
                for step in steps:
                    step(self._pipe, state)
                for consumed in ("videos", "latents", "input_latents"):
                    state.values.pop(consumed)

    def _attends_in_8_bits(self) -> bool:
        """Whether attention without a bias reads keys in 8 bits with a scale per head on the stream's device."""
        backend, device = self._attention.backend, self._attention.device
        if device is None or backend not in LIBRARY_BACKENDS:
            return False
        transformer = self._pipe.transformer
        kind = weight_dtype(transformer), transformer.config.attention_head_dim
        return library_attention.expect(backend, device, *kind) == FLASH3_FP8

    def _input_pictures(self, inputs: Mapping[str, Any]) -> torch.Tensor:
        """Pictures of a block's part of an input video, which lie on the CPU: the copy to the device is counted.

        They follow the pictures of the stream's past.
        """
        count = int(self._pipe.vae.config.scale_factor_temporal) * inputs["num_frames_per_block"]
        return torch.empty((count, inputs["height"], inputs["width"], 3), dtype=torch.uint8, device=META)

    def _long_past(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """State entries of a stream under way."""
        transformer, vae = self._pipe.transformer, self._pipe.vae
        context, block = inputs["context_frames"], inputs["num_frames_per_block"]
        height, width = inputs["height"], inputs["width"]
        scale = vae.config.scale_factor_spatial
        latents = (1, transformer.config.in_channels, max(context, block), height // scale, width // scale)
        packing = find_packing(inputs["kv_policy"], inputs["kv_format"], context, block)
        eight_bits = packing is None and inputs.get("attention_bias", 1.0) == 1.0 and self._attends_in_8_bits()
        if eight_bits:
            causal = causal_attention_of(transformer)
            causal.use_backend(FLASH3_FP8)
            causal.load_library = lambda name, *_: name
        cache = allocate_kv_cache(
            transformer,
            frames=context + block,
            latent_height=height // scale,
            latent_width=width // scale,
            sink_frames=inputs["sink_frames"],
            packing=packing,
            eight_bits=eight_bits,
        )
        self.kv_layer_bytes = cache.layer_bytes
        cache.commit(context * cache.tokens_per_frame)
        pictures = frame_cache_length(vae, context)
        return {
            "stream_position": context + block,
            "kv_cache": cache,
            "current_denoised_latents": torch.empty(latents, device=META),
            "frame_cache_context": deque(
                [torch.empty((1, 3, height, width), dtype=vae_dtype(vae), device=META) for _ in range(pictures)],
                maxlen=pictures,
            ),
        }


def _cast(model: torch.nn.Module, dtype: torch.dtype, kept: frozenset[str]) -> None:
    for name, parameter in model.named_parameters():
        if not any(part in kept for part in name.split(".")):
            parameter.data = parameter.data.to(dtype)
