"""The decoder of Wan 2.1's VAE in stages, each of which can be computed a band of rows at a time.

Only the middle block's attention sees a whole picture, and that is done at the size of the latents. What comes after it
is 3x3 convolutions and norms over channels, so rows at a distance do not matter: a band that is computed with as many
rows beside it as its convolutions reach has the values of the whole. Halos of the entire decoder would be 13 latent
rows on each side; a stage ends before pictures are enlarged, so its band has a halo of its own of some rows.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from diffusers.models.autoencoders.autoencoder_kl_wan import (
    WanCausalConv3d,
    WanDecoder3d,
    WanResample,
    WanResidualBlock,
)
from torch import nn


@dataclass(frozen=True)
class Band:
    """Rows of a stage's input: `start` to `stop` are those it makes pictures of, `top` to `bottom` those it reads."""

    top: int
    start: int
    stop: int
    bottom: int


@dataclass(frozen=True)
class DecoderStage:
    """A part of the decoder between two enlargements.

    Attributes:
        upsampler: enlarges the stage's input; None for the first stage.
        resnets: after it.
        decoder: whose last norm and convolution the stage ends with; None for all but the last stage.
        first_feature: place of its first convolution over several frames in the cache.
        size: relative size of what it works on.
    """

    upsampler: WanResample | None
    resnets: tuple[WanResidualBlock, ...]
    decoder: WanDecoder3d | None
    first_feature: int
    size: int

    @property
    def scale(self) -> int:
        """Rows that are made of one."""
        return 1 if self.upsampler is None else 2

    @property
    def halo(self) -> int:
        """Rows of the stage's input, on each side, that a row it makes depends on."""
        modules: list[nn.Module] = [*self.resnets] + ([] if self.upsampler is None else [self.upsampler])
        reach = sum(_reach(part) for module in modules for part in module.modules())
        reach += 0 if self.decoder is None else _reach(self.decoder.conv_out)
        return -(-reach // self.scale)

    def bands(self, rows: int, count: int) -> list[Band]:
        """Split the stage's input into at most `count` bands, none thinner than its halo."""
        halo = self.halo
        count = max(1, min(count, rows // halo))
        edges = [rows * index // count for index in range(count + 1)]
        return [
            Band(max(0, start - halo), start, stop, min(rows, stop + halo)) for start, stop in itertools.pairwise(edges)
        ]


def split_into_stages(decoder: WanDecoder3d) -> list[DecoderStage]:
    """The stages after the middle block, in order.

    Args:
        decoder: of Wan 2.1's VAE; the up blocks of Wan 2.2's have shortcuts around what is a stage here.
    """
    feature = count_features(decoder.conv_in) + count_features(decoder.mid_block)
    stages: list[DecoderStage] = []
    upsampler, area, frames = None, 1, 1
    for index, block in enumerate(decoder.up_blocks):
        if upsampler is not None:
            area, frames = 4 * area, frames * (2 if upsampler.mode == "upsample3d" else 1)
        resnets = tuple(block.resnets)
        last = decoder if index == len(decoder.up_blocks) - 1 else None
        size = resnets[-1].conv2.out_channels * area * frames
        parts = [*resnets, *([] if upsampler is None else [upsampler]), *([] if last is None else [last.conv_out])]
        stages.append(DecoderStage(upsampler, resnets, last, feature, size))
        feature += sum(count_features(part) for part in parts)
        upsampler = None if block.upsamplers is None else block.upsamplers[0]
    return stages


def count_features(module: nn.Module) -> int:
    """Convolutions over several frames in `module`, each of which keeps past frames."""
    convolutions = [part for part in module.modules() if isinstance(part, WanCausalConv3d)]
    return sum(convolution.kernel_size[0] > 1 for convolution in convolutions)


def _reach(module: nn.Module) -> int:
    """Rows beside its own that a convolution reads."""
    if not isinstance(module, nn.Conv2d | nn.Conv3d):
        return 0
    return int(module.kernel_size[-2]) // 2
