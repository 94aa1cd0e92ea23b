"""diffusers' names for the parameters of Wan 2.2's VAE, which its single-file converter does not know.

Wan nests what 2.1 has in a row: `decoder.upsamples.1.upsamples.0` is the first residual block of the second level.
"""

from __future__ import annotations

import re

# What the names of this VAE begin with, and those of 2.1 do not.
RESIDUAL_MARK = "decoder.upsamples.0.upsamples."
# Tried one after another on each name.
_RENAMED = tuple(
    (re.compile(pattern), name)
    for pattern, name in (
        (r"^conv1\.", "quant_conv."),
        (r"^conv2\.", "post_quant_conv."),
        (r"coder\.conv1\.", "coder.conv_in."),
        (r"\.middle\.0\.", ".mid_block.resnets.0."),
        (r"\.middle\.1\.", ".mid_block.attentions.0."),
        (r"\.middle\.2\.", ".mid_block.resnets.1."),
        (r"\.head\.0\.", ".norm_out."),
        (r"\.head\.2\.", ".conv_out."),
        (r"\.(down|up)samples\.(\d+)\.\w+\.\d+\.(resample|time_conv)\.", r".\1_blocks.\2.\1sampler.\3."),
        (r"\.(down|up)samples\.(\d+)\.\w+\.(\d+)\.", r".\1_blocks.\2.resnets.\3."),
        (r"\.residual\.0\.", ".norm1."),
        (r"\.residual\.2\.", ".conv1."),
        (r"\.residual\.3\.", ".norm2."),
        (r"\.residual\.6\.", ".conv2."),
        (r"\.shortcut\.", ".conv_shortcut."),
    )
)


def from_residual_names(name: str) -> str:
    """diffusers' name of the parameter that Wan calls `name`; names that both share are returned unchanged.

    `decoder.upsamples.0.upsamples.3.time_conv.bias` is `decoder.up_blocks.0.upsampler.time_conv.bias`.
    """
    for pattern, ours in _RENAMED:
        name = pattern.sub(ours, name)
    return name
