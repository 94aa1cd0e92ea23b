"""The decoder of Wan 2.1's VAE for a running stream, computed channels-last with fused norms.

The same computation as diffusers' `WanDecoder3d`, which still decodes the first two latent frames of a stream, other
VAEs, and on other devices. From the third frame on, every convolution has two cached frames and this module is used:

- Tensors are [frames, height, width, channels], cuDNN's own layout, so no tensor is transposed or padded.
- Between two convolutions there is one pass over memory (`norm_silu`).
- Convolutions of few channels become 2-D ones over three frames side by side: on an H200 cuDNN multiplies 96 channels
  at 490 TFLOP/s so, and at 270 in three dimensions (`benchmarks/vae_convolutions.py`). The sums are the same.
- Convolutions of an enlarged picture are made from the small one.

The cache is diffusers' own list, so both can decode one stream.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import (
    AutoencoderKLWan,
    WanCausalConv3d,
    WanDecoder3d,
    WanResample,
    WanRMS_norm,
)
from torch import nn
from torch.nn import functional as F

from .decoder_stages import DecoderStage, split_into_stages
from .norm_silu import PAST_FRAMES, TAPS, PendingSum, norm_into_window
from .residual_blocks import (
    AnyFeatures,
    Features,
    apply_mid_block,
    apply_residual_block,
    from_diffusers,
    spatial_padding,
    takes_fused_passes,
    to_diffusers,
)

# A convolution of at most this many channels is folded.
_FOLDED_CHANNELS = 128

DecoderForward = Callable[..., torch.Tensor]


def fuse_decoder(vae: AutoencoderKLWan) -> None:
    """Make the VAE's decoder use this module for steady latent frames. VAEs of another architecture are not changed."""
    if vae.decoder.training or not takes_fused_passes(vae.config):
        return
    stages = tuple(split_into_stages(vae.decoder))
    vae.decoder.forward = _SteadyForward(vae.decoder, stages, vae.decoder.forward)


@dataclass(frozen=True)
class _SteadyForward:
    """Replaces the decoder's forward."""

    decoder: WanDecoder3d
    stages: tuple[DecoderStage, ...]
    original: DecoderForward

    def __call__(
        self,
        x: torch.Tensor,
        feat_cache: Features | None = None,
        feat_idx: list[int] | None = None,
        first_chunk: bool = False,
    ) -> torch.Tensor:
        """Decode latents [1, z_dim, frames, height, width]; arguments as diffusers'."""
        if feat_cache is None or first_chunk or x.shape[0] != 1 or not is_steady(feat_cache):
            return self.original(x, feat_cache=feat_cache, feat_idx=feat_idx or [0], first_chunk=first_chunk)
        return to_diffusers(_SteadyPass(feat_cache).decode(self.decoder, self.stages, from_diffusers(x)))


def is_fused(decoder: WanDecoder3d) -> bool:
    """Whether `fuse_decoder` changed the decoder."""
    return isinstance(decoder.forward, _SteadyForward)


def is_steady(features: Iterable[torch.Tensor | str | None]) -> bool:
    """Whether each of the convolutions has its two frames, so that this module can run them."""
    return all(isinstance(feature, torch.Tensor) and feature.shape[2] == PAST_FRAMES for feature in features)


def run_steady_entry(decoder: WanDecoder3d, latents: torch.Tensor, features: AnyFeatures) -> torch.Tensor:
    """The first convolution and the middle block, of latents [1, z_dim, frames, height, width]."""
    return to_diffusers(_SteadyPass(features).enter(decoder, from_diffusers(latents)).add_up())


def run_steady_stage(stage: DecoderStage, value: torch.Tensor, features: AnyFeatures) -> torch.Tensor:
    """A stage of the decoder, of [1, channels, frames, height, width]; the last makes pixels."""
    made = _SteadyPass(features, stage.first_feature).run_stage(stage, PendingSum(from_diffusers(value)))
    return to_diffusers(made.add_up())


@dataclass
class _SteadyPass:
    """One walk through the decoder; `features` are replaced one by one, in the order diffusers counts them."""

    features: AnyFeatures
    _next: int = field(default=0)

    def decode(self, decoder: WanDecoder3d, stages: Iterable[DecoderStage], latents: torch.Tensor) -> torch.Tensor:
        """[frames, height, width, z_dim] to pixels [4 * frames, 8 * height, 8 * width, channels]."""
        value = self.enter(decoder, latents)
        for stage in stages:
            value = self.run_stage(stage, value)
        return value.add_up()

    def enter(self, decoder: WanDecoder3d, latents: torch.Tensor) -> PendingSum:
        """The first convolution and the middle block."""
        value = PendingSum(self._convolve_window(decoder.conv_in, latents), decoder.conv_in.bias)
        return apply_mid_block(decoder.mid_block, value, self._normed_convolution)

    def run_stage(self, stage: DecoderStage, value: PendingSum) -> PendingSum:
        """One stage; the last makes pixels."""
        if stage.upsampler is not None:
            value = self._upsample(stage.upsampler, value.add_up())
        for resnet in stage.resnets:
            value = apply_residual_block(resnet, value, self._normed_convolution)
        if stage.decoder is None:
            return value
        head = stage.decoder.conv_out
        return PendingSum(self._normed_convolution(stage.decoder.norm_out, head, value), head.bias)

    def _upsample(self, resample: WanResample, value: torch.Tensor) -> PendingSum:
        if resample.mode == "upsample3d":
            doubled = self._convolve_window(resample.time_conv, value).add_(resample.time_conv.bias)
            frames, height, width, channels = value.shape
            # The two halves of the channels are two consecutive frames.
            halves = doubled.view(frames, height, width, 2, channels).permute(0, 3, 1, 2, 4)
            value = halves.reshape(2 * frames, height, width, channels)
        convolution = resample.resample[1]
        return PendingSum(_convolve_doubled(convolution, value), convolution.bias)

    def _normed_convolution(self, norm: WanRMS_norm, convolution: WanCausalConv3d, value: PendingSum) -> torch.Tensor:
        """The convolution of the normed sum, without its bias."""
        fold = convolution.in_channels <= _FOLDED_CHANNELS
        normed = norm_into_window(value, norm.gamma.flatten(), self._take_past(), fold=fold)
        self._keep_past(normed.past)
        return (_convolve_folded if fold else _convolve)(convolution, normed.window)

    def _convolve_window(self, convolution: WanCausalConv3d, frames: torch.Tensor) -> torch.Tensor:
        """The convolution, without its bias, of frames with no norm before it."""
        window = torch.cat([self._take_past(), frames])
        self._keep_past(window[-PAST_FRAMES:].clone())
        return _convolve(convolution, window)

    def _take_past(self) -> torch.Tensor:
        feature = self.features[self._next]
        assert isinstance(feature, torch.Tensor)
        return from_diffusers(feature)

    def _keep_past(self, past: torch.Tensor) -> None:
        self.features[self._next] = to_diffusers(past)
        self._next += 1


def _convolve(convolution: WanCausalConv3d, window: torch.Tensor) -> torch.Tensor:
    """[2 + frames, height, width, channels] to [frames, height, width, out channels]."""
    padding = (0, *spatial_padding(convolution))
    return from_diffusers(F.conv3d(to_diffusers(window), convolution.weight, padding=padding))


def _convolve_folded(convolution: WanCausalConv3d, window: torch.Tensor) -> torch.Tensor:
    """[frames, height, width, 3 * channels] to [frames, height, width, out channels]."""
    out_channels, channels, _, rows, columns = convolution.weight.shape
    weight = convolution.weight.transpose(1, 2).reshape(out_channels, TAPS * channels, rows, columns)
    weight = weight.contiguous(memory_format=torch.channels_last)
    made = F.conv2d(window.permute(0, 3, 1, 2), weight, padding=spatial_padding(convolution))
    return made.permute(0, 2, 3, 1).contiguous()


def _convolve_doubled(convolution: nn.Conv2d, pictures: torch.Tensor) -> torch.Tensor:
    """A 3x3 convolution of pictures enlarged twice by repeating pixels, without its bias, made from the small pictures.

    [frames, height, width, channels] to [frames, 2 * height, 2 * width, out channels]. A window of 3 on repeated
    pixels covers 2 different ones: an even pixel is (w0, w1 + w2) times the pixel before and its own, an odd one
    (w0 + w1, w2) times its own and the next. So each of the four positions in a doubled pixel is a
    2x2 convolution, and all four are one with four times the channels: 4/9 of the products, and no enlarged copy.
    """
    frames, height, width, _ = pictures.shape
    weight = convolution.weight.float()
    rows = torch.stack((_pair_taps(weight, 2, odd=False), _pair_taps(weight, 2, odd=True)))
    taps = torch.stack((_pair_taps(rows, 4, odd=False), _pair_taps(rows, 4, odd=True)), dim=1)
    taps = taps.flatten(0, 2).to(pictures.dtype).contiguous(memory_format=torch.channels_last)
    made = F.conv2d(pictures.permute(0, 3, 1, 2), taps, padding=1).permute(0, 2, 3, 1).unflatten(-1, (2, 2, -1))
    doubled = made.new_empty((frames, height, 2, width, 2, made.shape[-1]))
    for row, column in itertools.product(range(2), range(2)):
        doubled[:, :, row, :, column] = made[:, row : row + height, column : column + width, row, column]
    return doubled.view(frames, 2 * height, 2 * width, -1)


def _pair_taps(weight: torch.Tensor, dim: int, *, odd: bool) -> torch.Tensor:
    """The 2 taps of an even or odd pixel, from the 3 along `dim`."""
    first, middle, last = weight.unbind(dim)
    return torch.stack((first + middle, last) if odd else (first, middle + last), dim=dim)
