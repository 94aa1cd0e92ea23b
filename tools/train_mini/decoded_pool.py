"""Latents with the pictures that the mini pipeline's VAE makes of them: what a tiny decoder learns from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan

from ...stream.materialise import materialise
from ...stream.recipe import Recipe
from ...stream.session import Session
from ...stream.settings import StreamSettings
from ...wan.steps.host_pictures import to_uint8_pictures
from ...wan.vae.streaming_vae import DecoderCache, EncoderCache, decode_latent_frame, encode_pixel_frames
from .checkpoint import load_made_with, save_whole, step_generator
from .clips import SIZE, ClipPlan, draw_clips, draw_plan
from .latent_pool import BLOCK_FRAMES, CHANGE_SHARE
from .progress import Progress
from .scenes import change_scene, draw_scene, plain_caption

STREAM_BLOCKS = 4
CLIP_FRAMES = 6
_CUTS = tuple(1 + 4 * frame for frame in range(1, CLIP_FRAMES - 1))
_BATCH = 8
# Largest standard deviation of the noise on a clip's latents: a transformer's are not quite an encoder's.
_NOISE = 0.2
# Of streams: far from those that are measured.
_FIRST_SEED = 3_000_000


@dataclass(frozen=True)
class DecodedStream:
    """The beginning of a stream.

    Attributes:
        latents: float32 [channels, latent frames, 8, 8], as the transformer works on them.
        pictures: uint8 [3, 1 + 4 * (latent frames - 1), 64, 64], by the VAE's decoder.
    """

    latents: torch.Tensor
    pictures: torch.Tensor

    @property
    def frames(self) -> int:
        """Latent frames."""
        return self.latents.shape[1]


def make_decoded_pool(pipeline: Path, folder: Path, *, clips: int, streams: int, seed: int) -> list[DecodedStream]:
    """Make the pool, or read it from `folder`, where it is kept.

    Args:
        pipeline: folder of the mini pipeline.
        folder: of the training.
        clips: drawn ones, encoded, with noise on half of their latents, of `CLIP_FRAMES` latent frames.
        streams: of the transformer, of `STREAM_BLOCKS` blocks; half of them change their prompt.
        seed: of everything drawn.

    Returns:
        The clips, then the streams.
    """
    path = folder / "decoded_pool.safetensors"
    made_with = f"{clips} clips, {streams} streams, seed {seed}"
    kept = load_made_with(path, made_with)
    if kept is None:
        rows = [*_decoded_clips(pipeline, clips, seed), *_decoded_streams(pipeline, streams, seed)]
        kept = {f"{kind}/{number}": vars(row)[kind] for number, row in enumerate(rows) for kind in vars(row)}
        save_whole(path, kept, {"made_with": made_with})
    return [DecodedStream(kept[f"latents/{number}"], kept[f"pictures/{number}"]) for number in range(clips + streams)]


def _decoded_clips(pipeline: Path, count: int, seed: int) -> Iterator[DecodedStream]:
    vae = AutoencoderKLWan.from_pretrained(pipeline / "vae", torch_dtype=torch.float32).eval()
    progress = Progress("drawn clips", 0, count)
    for start in range(0, count, _BATCH):
        generator = step_generator(seed, "decoded clips", start)
        plans = [draw_plan(generator, cuts=_CUTS, change_share=CHANGE_SHARE) for _ in range(min(_BATCH, count - start))]
        latents = _encode(vae, plans)
        strength = (_NOISE * torch.rand(len(plans), generator=generator)).view(-1, 1, 1, 1, 1)
        noisy = torch.rand(strength.shape, generator=generator) < 0.5
        latents += noisy * strength * torch.randn(latents.shape, generator=generator)
        yield from map(DecodedStream, latents, _decode(vae, latents))
        progress.show(start + len(plans), "encoded and decoded")


def _encode(vae: AutoencoderKLWan, plans: Sequence[ClipPlan]) -> torch.Tensor:
    pictures = draw_clips(plans, 1 + 4 * (CLIP_FRAMES - 1))
    return encode_pixel_frames(vae, pictures, EncoderCache.for_vae(vae))


def _decode(vae: AutoencoderKLWan, latents: torch.Tensor) -> torch.Tensor:
    """Of [clips, channels, latent frames, 8, 8]; uint8 [clips, 3, pictures, 64, 64]."""
    cache = DecoderCache.for_vae(vae)
    pictures = torch.cat([decode_latent_frame(vae, frame, cache) for frame in latents.split(1, dim=2)], dim=2)
    return to_uint8_pictures(pictures).movedim(-1, 1).contiguous()


def _decoded_streams(pipeline: Path, count: int, seed: int) -> Iterator[DecodedStream]:
    materialised = materialise(Recipe(str(pipeline), dtype="float32"))
    progress = Progress("streams", 0, count)
    for number in range(count):
        generator = step_generator(seed, "decoded streams", number)
        scene = draw_scene(generator)
        scenes = [scene] * STREAM_BLOCKS
        if number % 2:
            scenes[STREAM_BLOCKS // 2 :] = [change_scene(scene, generator)] * (STREAM_BLOCKS - STREAM_BLOCKS // 2)
        settings = StreamSettings(
            width=SIZE, height=SIZE, blocks=STREAM_BLOCKS, frames_per_block=BLOCK_FRAMES, seed=_FIRST_SEED + number
        )
        latents, pictures = [], []
        with Session(materialised, settings) as session:
            for one in scenes:
                pictures.append(session.run_block(plain_caption(one)).frames)
                latents.append(session.state.values["latents"][0].float().cpu().clone())
        yield DecodedStream(torch.cat(latents, dim=1), torch.cat(pictures).movedim(-1, 0).contiguous())
        progress.show(number + 1, f"of {STREAM_BLOCKS} blocks")
