"""The convolutions of Wan's VAE decoder in three ways: how fast cuDNN computes each.

    python benchmarks/vae_convolutions.py            # a CUDA device, 832x480
    python benchmarks/vae_convolutions.py --shrink 16 --device cpu   # that it runs

"in time" is one 3-D convolution, "folded" a 2-D one over three frames side by side in the channels, "by tap" three 2-D
ones whose results are not yet added. All compute the same sums; the tensors are channels-last, in float16 on CUDA.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import torch
from floors import device_of
from torch.nn import functional as F

TAPS = 3


@dataclass(frozen=True)
class ConvolutionShape:
    """Channels in and out, and the size of the output: frames, height, width."""

    channels: int
    out_channels: int
    frames: int
    height: int
    width: int

    @property
    def operations(self) -> int:
        """Multiplications and additions."""
        return 2 * TAPS**3 * self.channels * self.out_channels * self.frames * self.height * self.width


# One latent frame of 832x480 on its way through the decoder.
SHAPES = (
    ConvolutionShape(384, 384, 1, 60, 104),
    ConvolutionShape(384, 384, 2, 120, 208),
    ConvolutionShape(192, 192, 4, 240, 416),
    ConvolutionShape(96, 96, 4, 480, 832),
)


def make_ways(shape: ConvolutionShape, device: torch.device) -> dict[str, Callable[[], torch.Tensor]]:
    """The three ways on the same random tensors; each returns [out channels, frames, height, width]."""
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    generator = torch.Generator(device).manual_seed(0)
    size = (TAPS - 1 + shape.frames, shape.height, shape.width, shape.channels)
    window = torch.randn(size, device=device, generator=generator).to(dtype)
    weight_size = (shape.out_channels, shape.channels, TAPS, TAPS, TAPS)
    weight = torch.randn(weight_size, device=device, generator=generator) / (TAPS**3 * shape.channels) ** 0.5
    weight = weight.to(dtype)
    in_time = window.permute(3, 0, 1, 2).unsqueeze(0)
    weight_in_time = weight.contiguous(memory_format=torch.channels_last_3d)
    shifted = [window[tap : tap + shape.frames] for tap in range(TAPS)]
    folded = torch.cat(shifted, dim=-1).permute(0, 3, 1, 2)
    weight_folded = weight.transpose(1, 2).flatten(1, 2).contiguous(memory_format=torch.channels_last)
    taps = [
        (frames.permute(0, 3, 1, 2), weight[:, :, tap].contiguous(memory_format=torch.channels_last))
        for tap, frames in enumerate(shifted)
    ]
    return {
        "in time": lambda: F.conv3d(in_time, weight_in_time, padding=(0, 1, 1))[0],
        "folded": lambda: F.conv2d(folded, weight_folded, padding=1).transpose(0, 1),
        "by tap": lambda: torch.stack([F.conv2d(x, w, padding=1) for x, w in taps]).sum(0).transpose(0, 1),
    }


def measure_milliseconds(compute: Callable[[], object], device: torch.device, repeats: int = 10) -> float:
    """Median of `repeats`, after one warm-up."""
    compute()
    times = []
    for _ in range(repeats):
        _wait_for(device)
        began = time.perf_counter()
        compute()
        _wait_for(device)
        times.append(1000 * (time.perf_counter() - began))
    return median(times)


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--shrink", type=int, default=1, help="divide height and width by this")
    options = parser.parse_args()
    device = device_of(options.device)
    print(f"{'convolution':<28}{'way':<10}{'ms':>9}{'TFLOP/s':>10}{'difference':>12}")
    for full in SHAPES:
        height, width = full.height // options.shrink, full.width // options.shrink
        shape = ConvolutionShape(full.channels, full.out_channels, full.frames, height, width)
        ways = make_ways(shape, device)
        reference = ways["in time"]().float()
        label = f"{shape.channels}->{shape.out_channels} {shape.frames}x{shape.height}x{shape.width}"
        for way, compute in ways.items():
            difference = float((compute().float() - reference).norm() / reference.norm())
            milliseconds = measure_milliseconds(compute, device)
            rate = shape.operations / milliseconds / 1e9
            print(f"{label:<28}{way:<10}{milliseconds:>9.3f}{rate:>10.1f}{difference:>12.1e}", flush=True)


if __name__ == "__main__":
    main()
