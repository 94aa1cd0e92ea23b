"""Operations and bytes of each stage of a block, counted on the meta device from the shapes.

Nothing is computed: the real code of `wan/` runs on tensors without storage under torch's flop counter.
Bytes are the fewest a layer-by-layer execution moves: each layer's weights, input and output once, and the keys
and values that attention reads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import streamblocks_path  # noqa: F401
import torch
from full_size_models import META, ModelSize, build_transformer_skeleton, build_vae_skeleton
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from streamblocks.families.kv_policies import RECOMPUTE, ROLLING
from streamblocks.stream.settings import StreamSettings
from streamblocks.wan.steps.text_step import DEFAULT_TEXT_TOKENS
from streamblocks.wan.transformer.attention_passes import CausalPass
from streamblocks.wan.transformer.causal_transformer import allocate_cross_cache, allocate_kv_cache, predict_velocity
from streamblocks.wan.transformer.installed_attention import install_causal_attention
from streamblocks.wan.transformer.kv_cache import KVCache
from streamblocks.wan.vae.streaming_vae import DecoderCache, decode_latent_frame, encode_pixel_frame

_LINEAR = frozenset({"aten.mm", "aten.addmm"})
_CONVOLUTION = frozenset({"aten.convolution", "aten.cudnn_convolution"})


@dataclass(frozen=True)
class Work:
    """Floating-point operations by kind, and bytes moved.

    `linear_bytes` are of linear layers' weights as stored in bfloat16; `bytes` has all other bytes.
    """

    linear: int = 0
    attention: int = 0
    convolution: int = 0
    linear_bytes: int = 0
    bytes: int = 0

    def __add__(self, other: Work) -> Work:
        mine, theirs = asdict(self), asdict(other)
        return Work(**{name: mine[name] + theirs[name] for name in mine})

    @property
    def operations(self) -> int:
        """Of all kinds."""
        return self.linear + self.attention + self.convolution


@dataclass(frozen=True)
class BlockWork:
    """Work of one steady block (context full) by stage; `step` is one denoising pass."""

    context_pass: Work
    context_encode: Work
    step: Work
    remember: Work
    decode: Work

    def by_stage(self, settings: StreamSettings) -> dict[str, Work]:
        """The stages the settings' policy has, under the names of the printed table."""
        stages = {f"step {number}": self.step for number in range(settings.steps)}
        if settings.kv_policy == RECOMPUTE:
            stages |= {"context": self.context_pass, "encode": self.context_encode}
        else:
            stages["remember"] = self.remember
        return stages | {"decode": self.decode}


def count_block_work(size: ModelSize, settings: StreamSettings) -> BlockWork:
    """Count one steady block of `settings` on the model `size`."""
    counter = _Counter(size, settings)
    return BlockWork(
        context_pass=counter.context_pass(),
        context_encode=counter.encode(),
        step=counter.step(),
        remember=counter.step() if settings.kv_policy == ROLLING else Work(),
        decode=counter.decode(),
    )


class _Counter:
    """The model on the meta device, and a count for each stage."""

    def __init__(self, size: ModelSize, settings: StreamSettings) -> None:
        self.settings = settings
        self.transformer = build_transformer_skeleton(size)
        install_causal_attention(self.transformer)
        self.vae = build_vae_skeleton(size)
        scale = self.vae.config.scale_factor_spatial
        self.latent_size = (settings.height // scale, settings.width // scale)

    def context_pass(self) -> Work:
        frames = self.settings.context_frames
        cache = self._cache()
        causal_tokens = self.settings.frames_per_block * cache.tokens_per_frame
        return self._transformer_pass(cache, frames=frames, causal_tokens=causal_tokens)

    def step(self) -> Work:
        cache = self._cache()
        cache.length = self.settings.context_frames * cache.tokens_per_frame
        return self._transformer_pass(cache, frames=self.settings.frames_per_block)

    def decode(self) -> Work:
        cache = DecoderCache.for_vae(self.vae)
        latent = torch.empty(1, self.vae.config.z_dim, 1, *self.latent_size, device=META)
        for _ in range(3):  # The caches are full after two latent frames.
            work = _count(self.vae, lambda: decode_latent_frame(self.vae, latent, cache))
        return sum((work for _ in range(self.settings.frames_per_block)), Work())

    def encode(self) -> Work:
        picture = torch.empty(1, 3, 1, self.settings.height, self.settings.width, device=META)
        return _count(self.vae, lambda: encode_pixel_frame(self.vae, picture))

    def _cache(self) -> KVCache:
        height, width = self.latent_size
        frames = self.settings.context_frames + self.settings.frames_per_block
        return allocate_kv_cache(self.transformer, frames=frames, latent_height=height, latent_width=width)

    def _transformer_pass(self, cache: KVCache, frames: int, causal_tokens: int | None = None) -> Work:
        text = allocate_cross_cache(self.transformer, text_tokens=DEFAULT_TEXT_TOKENS)
        causal_pass = CausalPass(cache, text, frame_offset=0, causal_tokens=causal_tokens)
        latents = torch.empty(1, self.transformer.config.in_channels, frames, *self.latent_size, device=META)
        work = _count(self.transformer, lambda: predict_velocity(self.transformer, latents, 0.0, causal_pass))
        visible = cache.length + frames * cache.tokens_per_frame
        per_token = 2 * len(cache.keys) * cache.keys[0][0, 0].numel() * cache.keys[0].element_size()
        return work + Work(bytes=(visible + DEFAULT_TEXT_TOKENS) * per_token)


def _count(module: nn.Module, call: Callable[[], Any]) -> Work:
    with _watched_layers(module) as moved, FlopCounterMode(display=False) as counter:
        call()
    counted: Mapping[Any, int] = counter.get_flop_counts().get("Global", {})
    linear = sum(n for operator, n in counted.items() if str(operator) in _LINEAR)
    convolution = sum(n for operator, n in counted.items() if str(operator) in _CONVOLUTION)
    return Work(
        linear=linear,
        convolution=convolution,
        attention=sum(counted.values()) - linear - convolution,
        linear_bytes=moved["linear"],
        bytes=moved["other"],
    )


@contextmanager
def _watched_layers(module: nn.Module) -> Iterator[dict[str, int]]:
    """Add up weights, input and output of each linear layer and convolution that runs inside the `with` block."""
    moved = {"linear": 0, "other": 0}

    def after(layer: nn.Module, arguments: Any, output: Any) -> None:  # noqa: ANN401
        weights = sum(_bytes(parameter) for parameter in layer.parameters(recurse=False))
        moved["linear" if isinstance(layer, nn.Linear) else "other"] += weights
        moved["other"] += _bytes(arguments[0]) + _bytes(output)

    layers = [layer for layer in module.modules() if isinstance(layer, nn.Linear | nn.Conv2d | nn.Conv3d)]
    hooks = [layer.register_forward_hook(after) for layer in layers]
    try:
        yield moved
    finally:
        for hook in hooks:
            hook.remove()


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()
