"""How far back the decoder's cache reaches: it is made anew from latents that were decoded, instead of being kept.

Every convolution of the decoder looks back two frames, and nothing else does in time: what the cache holds depends on
finitely many latent frames. Decoding these again, from an empty cache, gives the same bits.
"""

from __future__ import annotations

import math
from fractions import Fraction

from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d, WanResample
from torch import nn

# Of an empty cache the first frame is decoded as a stream's first, which the upsamplers in time treat apart, and the
# second is the first that they see.
_FRAMES_TREATED_APART = 2


def decoder_reach(decoder: nn.Module) -> int:
    """How many latent frames, decoded from an empty cache, leave the cache that all frames before would have left.

    A convolution over k frames looks back k - 1 of its own; an upsampler in time makes two frames of one, behind its
    convolution.
    """
    back, rate = Fraction(0), 1
    doubling = {id(part.time_conv) for part in decoder.modules() if _doubles(part)}
    # Modules are registered in the order in which they run.
    for part in decoder.modules():
        if isinstance(part, WanCausalConv3d):
            back += Fraction(part.kernel_size[0] - 1, rate)
            rate *= 2 if id(part) in doubling else 1
    return math.ceil(back) + _FRAMES_TREATED_APART


def _doubles(module: nn.Module) -> bool:
    return isinstance(module, WanResample) and module.mode == "upsample3d"
