"""Triton source of `norm_silu_launch`. Imported only where it runs."""

from __future__ import annotations

import triton
import triton.language as tl

# mypy: ignore-errors


# These counts differ from call to call and must not trigger recompilation.
@triton.jit(do_not_specialize=["frames", "pixels"])
def add_norm_silu(  # noqa: ANN201
    first,  # noqa: ANN001
    bias,  # noqa: ANN001
    residual,  # noqa: ANN001
    gamma,  # noqa: ANN001
    past,  # noqa: ANN001
    window,  # noqa: ANN001
    new_past,  # noqa: ANN001
    frames,  # noqa: ANN001
    pixels,  # noqa: ANN001
    channels,  # noqa: ANN001
    scale,  # noqa: ANN001
    epsilon,  # noqa: ANN001
    HAS_BIAS: tl.constexpr,  # noqa: N803
    HAS_RESIDUAL: tl.constexpr,  # noqa: N803
    PAST_FRAMES: tl.constexpr,  # noqa: N803
    FOLD: tl.constexpr,  # noqa: N803
    BLOCK_PIXELS: tl.constexpr,  # noqa: N803
    BLOCK_CHANNELS: tl.constexpr,  # noqa: N803
):
    """See `launch_norm_silu`. Grid: blocks of pixels x (past frames + frames); PAST_FRAMES is 2, or 0 for no window."""
    frame = tl.program_id(1) - PAST_FRAMES
    pixel = (tl.program_id(0) * BLOCK_PIXELS + tl.arange(0, BLOCK_PIXELS)).to(tl.int64)
    channel = tl.arange(0, BLOCK_CHANNELS)
    mask = (pixel < pixels)[:, None] & (channel < channels)[None, :]
    place = pixel[:, None] * channels + channel[None, :]
    # int64, because all frames together can have more than 2^31 values; a single frame cannot.
    step = pixels.to(tl.int64) * channels
    if frame < 0:
        value = tl.load(past + (frame + PAST_FRAMES) * step + place, mask, other=0.0).to(tl.float32)
    else:
        added = tl.load(first + frame * step + place, mask, other=0.0).to(tl.float32)
        if HAS_BIAS:
            added += tl.load(bias + channel, channel < channels, other=0.0).to(tl.float32)[None, :]
        if HAS_RESIDUAL:
            added += tl.load(residual + frame * step + place, mask, other=0.0).to(tl.float32)
        if HAS_BIAS or HAS_RESIDUAL:
            tl.store(first + frame * step + place, added, mask)
        length = tl.sqrt(tl.sum(added * added, axis=1))
        weight = tl.load(gamma + channel, channel < channels, other=0.0).to(tl.float32) * scale
        normed = added / tl.maximum(length, epsilon)[:, None] * weight[None, :]
        value = normed * tl.sigmoid(normed)
    if FOLD:
        # Frame f is the oldest of the three that frame f + 2 reads, the middle one of f + 1, the newest of f.
        folded = pixel[:, None] * (3 * channels) + channel[None, :]
        for tap in tl.static_range(3):
            reader = frame + 2 - tap
            if (reader >= 0) & (reader < frames):
                tl.store(window + reader * (3 * step) + folded + tap * channels, value, mask)
    else:
        tl.store(window + (frame + PAST_FRAMES) * step + place, value, mask)
    if frame >= frames - PAST_FRAMES:
        tl.store(new_past + (frame - (frames - PAST_FRAMES)) * step + place, value, mask)
