"""What a stream that goes on from given pictures finds in its state, as if it had made them itself."""

from __future__ import annotations

from collections import deque
from typing import Any

import torch
from diffusers import AutoencoderKLWan

from ..vae.banded_decoder import UNBOUNDED, DecodeBounds
from ..vae.stream_decoder import StreamDecoder
from ..vae.streaming_vae import encode_pixel_frames
from ..vae.video_encoder import VideoEncoder, to_pixels
from .context_policies import frame_cache_length


@torch.no_grad()
def entries_of_pictures(
    decoder: StreamDecoder,
    pictures: torch.Tensor,
    *,
    context_frames: int,
    sink_frames: int,
    video_follows: bool,
    bounds: DecodeBounds = UNBOUNDED,
) -> dict[str, Any]:
    """State entries for a stream that goes on after `pictures`.

    The last pictures, as many as make whole latent frames, are encoded as a video of their own: one picture is latent
    frame 0. The decoder has decoded them, so that there is no seam.

    Args:
        decoder: of the stream, on its device; its VAE encodes.
        pictures: uint8 [F, height, width, 3], 1 or more, oldest first.
        context_frames: latent frames of the past that a block sees.
        sink_frames: of these, how many stay the stream's first ones.
        video_follows: whether the encoder goes on from them with an input video; its cache, 1 GiB at 832x480, is let go
            of before they are decoded otherwise.
        bounds: how the decoder saves memory.
    """
    vae = decoder.vae
    scale = int(vae.config.scale_factor_temporal)
    frames = min(context_frames, 1 + (len(pictures) - 1) // scale)
    used = pictures[-frame_cache_length(vae, frames) :]
    pixels = to_pixels(vae, used)
    latents, encoder = _encode(vae, pixels, keep=video_follows)
    decoded = decoder.decode_again(latents, bounds)
    shown = pixels.to(vae.dtype).unbind(2)
    return {
        "stream_position": frames,
        "current_denoised_latents": latents,
        "sink_latents": latents[:, :, :sink_frames].clone() if sink_frames else None,
        "decoder_cache": decoded,
        "input_encoder": encoder,
        # Cloned: a view would keep all pictures.
        "frame_cache_context": deque(
            (picture.clone() for picture in shown), maxlen=frame_cache_length(vae, context_frames)
        ),
    }


def _encode(vae: AutoencoderKLWan, pixels: torch.Tensor, *, keep: bool) -> tuple[torch.Tensor, VideoEncoder | None]:
    encoder = VideoEncoder.for_vae(vae)
    latents = encode_pixel_frames(vae, pixels, encoder.cache)
    return latents, encoder if keep else None
