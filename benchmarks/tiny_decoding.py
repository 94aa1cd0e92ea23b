"""Milliseconds that a tiny decoder takes for a block of a stream, and whether its pieces are its whole, bit by bit.

python benchmarks/tiny_decoding.py [--size 832x480] [--channels 16]

Random weights in the layout of `taew2_1` (16 channels) or `taew2_2` (48). "frames" is how streams decode, one latent
frame after another; "block" decodes 3 at once.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial

import streamblocks_path  # noqa: F401
import torch

from streamblocks.wan.vae.gpu_layout import speed_up_decoder
from streamblocks.wan.vae.tiny_decoder import TinyDecoder, TinyDecoderConfig

BLOCK = 3
_WARM_UP, _TIMED = 5, 20


def main() -> None:
    """Run as a script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="832x480", help="of pictures, width x height")
    parser.add_argument("--channels", type=int, default=16, choices=(16, 48))
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("No CUDA device is here: run this where there is one.")
    config = TinyDecoderConfig(latent_channels=options.channels, patch_size=1 if options.channels == 16 else 2)
    width, height = (int(side) // config.spatial_scale for side in options.size.split("x"))
    torch.manual_seed(0)
    decoder = TinyDecoder(config).eval().requires_grad_(False).to("cuda", torch.float16)
    speed_up_decoder(decoder)
    latents = torch.randn((1, options.channels, BLOCK, height, width), device="cuda", dtype=torch.float16)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {options.size}, {options.channels} channels")
    for name, pieces in (("frames", [1] * BLOCK), ("block", [BLOCK])):
        torch.cuda.reset_peak_memory_stats()
        before, past = torch.cuda.memory_allocated(), decoder.empty_past()
        took = _milliseconds(partial(_decode, decoder, latents, past, pieces))
        peak = torch.cuda.max_memory_allocated() - before
        print(f"{name}: {took:.2f} ms a block of {BLOCK} latent frames, {peak / 1e9:.2f} GB at its largest")
    whole, parts = (
        torch.cat(_decode(decoder, latents, decoder.empty_past(), pieces), dim=2) for pieces in ([BLOCK], [1] * BLOCK)
    )
    print(f"equal to the bit: {torch.equal(whole, parts)}, largest difference {(whole - parts).abs().max().item():.2g}")


@torch.no_grad()
def _decode(
    decoder: TinyDecoder, latents: torch.Tensor, past: list[torch.Tensor | None], pieces: list[int]
) -> list[torch.Tensor]:
    return [decoder(piece, past) for piece in latents.split(pieces, dim=2)]


def _milliseconds(work: Callable[[], object]) -> float:
    for _ in range(_WARM_UP):
        work()
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    for _ in range(_TIMED):
        work()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / _TIMED


if __name__ == "__main__":
    main()
