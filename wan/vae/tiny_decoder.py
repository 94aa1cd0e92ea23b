"""A tiny decoder of Wan's latents: a stack of 2-D convolutions that see one frame of the past, in place of Wan's VAE.

The layout is that of TAEHV (github.com/madebyollin/taehv), which LightTAE shares, so the makers' files `taew2_1`,
`taew2_2`, `lighttaew2_1` and `lighttaew2_2` load with their own names of parameters. Facts of the layout:

- `tanh(x / 3) * 3` bounds the latents; a 3x3 convolution and ReLU widen them.
- Three stages. In each, blocks of three 3x3 convolutions with a shortcut read a frame and the frame before it (zeros
  before the first); then every pixel becomes 2x2 of them, a 1x1 convolution makes one or two frames of each, and a 3x3
  convolution without bias narrows it.
- ReLU and a 3x3 convolution make the picture, in 0..1; where `patch_size` is 2, its channels are 2x2 pixels.
- Of the first latent frame only the last picture counts: as many pictures as Wan's VAE makes.

All of the past is one frame per block: decoding a stream in any pieces makes what decoding it at once makes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import nn
from torch.nn import functional as F

IMAGE_CHANNELS = 3
_STAGES = 3
_LATENT_BOUND = 3.0

# Per block with memory: the newest frame that it read, [batch, width, height, width of the picture]; None before the
# first.
PastFrames = list[torch.Tensor | None]


@dataclass(frozen=True)
class TinyDecoderConfig:
    """What a file of a tiny decoder says of it.

    Attributes:
        latent_channels: of the latents; 16 for Wan 2.1, 48 for Wan 2.2 5B.
        widths: channels of the three stages, and behind the last.
        time_growth: how many frames each stage makes of one.
        blocks_per_stage: with memory.
        patch_size: side of the square of pixels that the last convolution makes at each place.
        takes_normalized: whether latents are read as the transformer works on them; else as Wan's VAE does, with its
            mean and standard deviation applied.
    """

    latent_channels: int = 16
    widths: tuple[int, int, int, int] = (256, 128, 64, 64)
    time_growth: tuple[int, int, int] = (1, 2, 2)
    blocks_per_stage: int = 3
    patch_size: int = 1
    takes_normalized: bool = True

    @property
    def pictures_per_latent(self) -> int:
        """Pictures of each latent frame but the first, which has one."""
        return math.prod(self.time_growth)

    @property
    def spatial_scale(self) -> int:
        """Side of a picture by that of its latent frame."""
        return 2**_STAGES * self.patch_size

    @property
    def reach(self) -> int:
        """How many latent frames, decoded from an empty past, leave the past that all frames before would have left."""
        back, rate = Fraction(0), 1
        for growth in self.time_growth:
            back += Fraction(self.blocks_per_stage, rate)
            rate *= growth
        return math.ceil(back)


class MemoryBlock(nn.Module):
    """Three convolutions beside a shortcut, over each frame and the one before it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        first, second, third = _conv3(2 * width, width), _conv3(width, width), _conv3(width, width)
        self.conv = nn.Sequential(first, nn.ReLU(inplace=True), second, nn.ReLU(inplace=True), third)

    def forward(self, frames: torch.Tensor, before: torch.Tensor | None, batch: int) -> torch.Tensor:
        """[batch * frames, width, height, width], and the frame before the first one, [batch, ...]."""
        return F.relu_(self.conv(_beside_past(frames, before, batch)).add_(frames))


class FrameGrowth(nn.Module):
    """A 1x1 convolution that makes `growth` consecutive frames of each."""

    def __init__(self, width: int, growth: int) -> None:
        super().__init__()
        self.growth = growth
        self.conv = nn.Conv2d(width, width * growth, 1, bias=False)

    def forward(self, frames: torch.Tensor) -> torch.Tensor:
        """[frames, width, ...] to [growth * frames, width, ...]."""
        made = self.conv(frames)
        if self.growth == 1:
            return made
        shape = (frames.shape[0] * self.growth, *frames.shape[1:])
        grown = torch.empty(shape, dtype=made.dtype, device=made.device, memory_format=_layout(made))
        for index, part in enumerate(made.chunk(self.growth, dim=1)):
            grown[index :: self.growth] = part
        return grown


class BoundedLatents(nn.Module):
    """Latents bounded smoothly to -3..3."""

    def forward(self, latents: torch.Tensor) -> torch.Tensor:
        """Of any shape."""
        return torch.tanh(latents / _LATENT_BOUND) * _LATENT_BOUND


class TinyDecoder(nn.Module):
    """Pictures of latents; parameters are named as in the makers' files (`decoder.1.weight`, ...)."""

    def __init__(self, config: TinyDecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.decoder = nn.Sequential(*_layers(config))

    @property
    def memory_blocks(self) -> int:
        """How many blocks read the frame before."""
        return sum(isinstance(layer, MemoryBlock) for layer in self.decoder)

    def empty_past(self) -> PastFrames:
        """Of a stream before its first latent frame."""
        return [None] * self.memory_blocks

    def forward(self, latents: torch.Tensor, past: PastFrames | None = None) -> torch.Tensor:
        """Decode the next latent frames of a stream, or a whole clip.

        Gradients flow through; `past` is a value of the forward pass alone.

        Args:
            latents: [batch, latent channels, any number of frames, height, width], in the dtype of the weights; in the
                scale that `config.takes_normalized` says.
            past: of the stream, which moves on; None for a clip. Where it is empty, the stream begins here.

        Returns:
            Pictures, 0..1 where the decoder has learned it (not clamped), [batch, 3, F, S * height, S * width];
            S is `config.spatial_scale`, F is `config.pictures_per_latent` times the latent frames, less all but one
            of the first latent frame of a stream.
        """
        batch, _, count, _, _ = latents.shape
        begins = past is None or all(before is None for before in past)
        value, block = latents.transpose(1, 2).flatten(0, 1), 0
        if latents.device.type == "cuda":
            value = value.contiguous(memory_format=torch.channels_last)
        for layer in self.decoder:
            if isinstance(layer, MemoryBlock):
                read = value
                value = layer(read, None if past is None else past[block], batch)
                if past is not None:
                    past[block] = _newest(read, batch)
                block += 1
            else:
                value = layer(value)
        if self.config.patch_size > 1:
            value = F.pixel_shuffle(value, self.config.patch_size)
        pictures = value.unflatten(0, (batch, count * self.config.pictures_per_latent)).transpose(1, 2)
        return pictures[:, :, self.config.pictures_per_latent - 1 :] if begins else pictures


def _layers(config: TinyDecoderConfig) -> Iterator[nn.Module]:
    """In the order of the makers' files, whose names count all of them."""
    widths = config.widths
    yield from (BoundedLatents(), _conv3(config.latent_channels, widths[0]), nn.ReLU(inplace=True))
    for width, narrower, growth in zip(widths, widths[1:], config.time_growth, strict=False):
        for _ in range(config.blocks_per_stage):
            yield MemoryBlock(width)
        # Here the files have the enlargement. It changes nothing that a 1x1 convolution reads, so frames are made
        # before it, of a quarter of the pixels.
        yield nn.Identity()
        yield FrameGrowth(width, growth)
        yield EnlargedConvolution(width, narrower, 3, padding=1, bias=False)
    yield from (nn.ReLU(inplace=True), _conv3(widths[-1], IMAGE_CHANNELS * config.patch_size**2))


class EnlargedConvolution(nn.Conv2d):
    """A convolution of pictures whose every pixel is repeated to 2x2."""

    def forward(self, frames: torch.Tensor) -> torch.Tensor:
        """[frames, channels, height, width] to [frames, out channels, 2 * height, 2 * width]."""
        count, channels, height, width = frames.shape
        shape = (count, channels, 2 * height, 2 * width)
        enlarged = torch.empty(shape, dtype=frames.dtype, device=frames.device, memory_format=_layout(frames))
        # A copy: on an H200 torch's own enlarging of channels-last pictures takes three times as long.
        enlarged.unflatten(3, (width, 2)).unflatten(2, (height, 2)).copy_(frames[:, :, :, None, :, None])
        return super().forward(enlarged)


def _conv3(inputs: int, outputs: int) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, padding=1)


def _layout(value: torch.Tensor) -> torch.memory_format:
    channels_last = value.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if channels_last else torch.contiguous_format


def _beside_past(frames: torch.Tensor, before: torch.Tensor | None, batch: int) -> torch.Tensor:
    """Each frame, and behind its channels those of the frame before it; one copy, in the layout of `frames`."""
    count, width, *picture = frames.shape
    shape = (count, 2 * width, *picture)
    window = torch.empty(shape, dtype=frames.dtype, device=frames.device, memory_format=_layout(frames))
    window[:, :width] = frames
    past = window[:, width:].unflatten(0, (batch, -1))
    if before is None:
        past[:, 0] = 0
    else:
        past[:, 0] = before
    past[:, 1:] = frames.unflatten(0, (batch, -1))[:, :-1]
    return window


def _newest(frames: torch.Tensor, batch: int) -> torch.Tensor:
    """The last frame of each of the batch; copied, as a view would keep all of them."""
    return frames.unflatten(0, (batch, -1))[:, -1].detach().clone()
