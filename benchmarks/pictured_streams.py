"""Do streams of the mini model follow the pictures that they are given, and the prompt where they should?

    python benchmarks/pictured_streams.py                                   # start image, video to video
    python benchmarks/pictured_streams.py --only video --strengths 0.3,0.5,0.7 --policies recompute --cases 24

Pictures and clips are drawn (`tools/train_mini/clips.py`) at random places, what the streams show is read from their
pixels (`drawn_truth.py`). No seed was used in training.

- Start image: a drawn shape, and the prompt that says what it is and where it goes. In the first block its colour and
  shape are to be those of the image, its direction the prompt's, and its place that of the image: where the shape has
  moved by then, at most `_NEAR` pixels off.
- Video to video: a drawn clip, and a prompt of another colour. The colour is to be the prompt's; the motion that of the
  clip: its direction, and its place in each picture, at most `_NEAR` pixels off in the middle one of all. With
  `--contradict` the prompt names another direction, too, and the motion is still to be the clip's.
- Strength 0 is compared with the VAE, by diffusers, encoding and decoding the clip at once.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any, TypeVar

import streamblocks_path
import torch
from drawn_truth import places, see
from picture_differences import psnr_of
from worker_processes import spread_work

from streamblocks.families.kv_policies import KV_POLICIES, RECOMPUTE
from streamblocks.memory.json_text import json_text
from streamblocks.stream.direction import Direction
from streamblocks.stream.keep_frames import KeepFrames
from streamblocks.stream.materialise import materialise
from streamblocks.stream.picture_sources import PictureBatch
from streamblocks.stream.pipelines import BuiltInPipeline
from streamblocks.stream.recipe import Recipe
from streamblocks.stream.run_stream import run_stream
from streamblocks.stream.settings import StreamSettings
from streamblocks.stream.sinks import FrameKeeper
from streamblocks.stream.start_pictures import StartPictures
from streamblocks.stream.video_input import VideoInput
from streamblocks.tools.train_mini.clips import SIZE, SPEED, ClipPlan, draw_clips
from streamblocks.tools.train_mini.scenes import COLORS, DIRECTIONS, Scene, all_scenes, another_of, plain_caption

MINI = streamblocks_path.ROOT / "models" / "mini"
PARTS = ("start", "video", "identity")
FPS = Fraction(8)
BLOCKS = 3
# Pictures that a stream of that many blocks takes.
PICTURES = 9 + 12 * (BLOCKS - 1)
# Where the colour follows the prompt and the movement the clip. A small picture is lost in less noise than a large one
# (Esser et al. 2024, section 5.3.2), so this is lower than what large models want: a picture here has 64 latent pixels.
# At shift 5 a block starts with a share of noise of 0.36.
MINI_STRENGTH = 0.1
_FIRST_SEED = 2_000_000
# Pixels; a shape is 20 to 26 wide.
_NEAR = 4.0

JobT = TypeVar("JobT")
OutcomeT = TypeVar("OutcomeT")


@dataclass(frozen=True)
class PicturedJob:
    """One stream to make.

    Attributes:
        shown: what the given pictures show.
        wanted: what the prompt says.
        x: column of the shape's centre in the first picture, 0..64.
        y: row of it.
        seed: of the stream's noise.
        strength: of video to video; None starts the stream with the first picture.
        model: folder of the pipeline.
        policy: of the KV cache.
    """

    shown: Scene
    wanted: Scene
    x: float
    y: float
    seed: int
    strength: float | None
    model: str = str(MINI)
    policy: str = RECOMPUTE

    def clip(self) -> torch.Tensor:
        """The drawn clip, float32 [pictures, 64, 64, 3] in 0..1."""
        return (draw_clips([ClipPlan(self.shown, self.shown, 0, self.x, self.y)], PICTURES)[0] / 2 + 0.5).movedim(0, -1)


@dataclass(frozen=True)
class PicturedOutcome:
    """What a stream showed.

    Attributes:
        color: whether the colour is the one wanted.
        shape: whether the shape is the one given.
        motion: whether it moves as it should: of a start image as the prompt says, of a video as the video does.
        distance: pixels between where the shape is and where it should be, in the first picture after a start image,
            in the middle one of all pictures of a video.
    """

    color: bool
    shape: bool
    motion: bool
    distance: float

    @property
    def place(self) -> bool:
        """Whether it is where it should be."""
        return self.distance <= _NEAR

    @property
    def all(self) -> bool:
        """Whether everything is right."""
        return self.color and self.shape and self.motion and self.place


class _NoWatcher:
    def while_loading(self, component: str, done: int, total: int) -> None: ...

    def before_pass(self, index: int) -> None: ...

    def after_block(self, block: object) -> None: ...


def start_jobs(cases: int, policy: str = RECOMPUTE, model: Path = MINI) -> list[PicturedJob]:
    """Start images of `cases` scenes."""
    scenes = _spread(all_scenes(), cases)
    return [
        PicturedJob(scene, scene, *_place(number), _FIRST_SEED + number, None, str(model), policy)
        for number, scene in enumerate(scenes)
    ]


def video_jobs(
    cases: int,
    strength: float = MINI_STRENGTH,
    policy: str = RECOMPUTE,
    model: Path = MINI,
    *,
    contradict: bool = False,
) -> list[PicturedJob]:
    """Clips of `cases` scenes, and prompts of another colour; of another direction, too, if they are to contradict."""
    jobs = []
    for number, scene in enumerate(_spread(all_scenes(), cases)):
        wanted = replace(scene, color=another_of(COLORS, scene.color, number))
        if contradict:
            wanted = replace(wanted, direction=another_of(DIRECTIONS, scene.direction, number // 3))
        seed = _FIRST_SEED + 1_000 + number
        jobs.append(PicturedJob(scene, wanted, *_place(number), seed, strength, str(model), policy))
    return jobs


def start_image_figures(outcomes: Sequence[PicturedOutcome]) -> dict[str, float]:
    """`start_image_accuracy`: colour, shape, place and motion right; and each of them."""
    return {"start_image_accuracy": _share(outcomes, "all")} | {
        f"start_image_{aspect}_accuracy": _share(outcomes, aspect) for aspect in ("color", "shape", "place", "motion")
    }


def video_figures(outcomes: Sequence[PicturedOutcome]) -> dict[str, float]:
    """`video_color_accuracy`, and `video_motion_accuracy`: direction and place are the clip's."""
    motion = [one.motion and one.place for one in outcomes]
    return {
        "video_color_accuracy": _share(outcomes, "color"),
        "video_motion_accuracy": sum(motion) / len(motion),
        "video_shape_accuracy": _share(outcomes, "shape"),
    }


def make_pictured_stream(job: PicturedJob) -> PicturedOutcome:
    """Make one stream and look at it."""
    clip = job.clip()
    frames = stream_frames(job, clip)
    if job.strength is None:
        # The image itself comes first.
        first = frames[1:10]
        seen = see(first)
        step = torch.tensor(DIRECTIONS[job.wanted.direction], dtype=torch.float32) * SPEED
        away = _wrapped(places(frames[1:2]) - places(frames[:1]) - step)[0]
    else:
        seen = see(frames)
        away = _wrapped(places(frames) - places(clip.mul(255).round().to(torch.uint8))).median(0).values
    moves_as = job.wanted if job.strength is None else job.shown
    return PicturedOutcome(
        color=seen.color == job.wanted.color,
        shape=seen.shape == job.shown.shape,
        motion=seen.direction == moves_as.direction,
        distance=float(away.norm()),
    )


def stream_frames(job: PicturedJob, clip: torch.Tensor) -> torch.Tensor:
    """The pictures of the stream, uint8 [F, 64, 64, 3]."""
    pipeline = materialise(Recipe(job.model, dtype="float32"))
    settings = StreamSettings(
        width=SIZE, height=SIZE, blocks=1 if job.strength is None else BLOCKS, seed=job.seed, kv_policy=job.policy
    )
    caption = plain_caption(job.wanted)
    start = video = None
    if job.strength is None:
        start = StartPictures(PictureBatch("start", clip[:1]), FPS)
    else:
        video = VideoInput(PictureBatch("video", clip, FPS), FPS, job.strength)
    keeper = FrameKeeper(KeepFrames.ALL)
    run_stream(pipeline, settings, Direction(lambda _: caption, start=start, video=video), [keeper], _NoWatcher())
    frames = keeper.frames()
    assert frames is not None
    return frames


def identity_errors(job: PicturedJob) -> tuple[float, float]:
    """Mean squared errors (0..255 squared) of the stream at strength 0, and of the VAE by diffusers, to the clip."""
    clip = job.clip()
    frames = stream_frames(replace(job, strength=0.0), clip)
    pipeline = materialise(Recipe(job.model, dtype="float32"))
    assert isinstance(pipeline, BuiltInPipeline)
    vae = pipeline.pipe.vae
    with torch.no_grad():
        latents = vae.encode(clip.movedim(-1, 0)[None] * 2 - 1).latent_dist.mode()
        decoded = vae.decode(latents).sample[0].movedim(0, -1).clamp(-1, 1)
    drawn = clip * 255
    return (
        float((frames.float() - drawn).square().mean()),
        float(((decoded + 1) * 127.5).round().sub(drawn).square().mean()),
    )


def measure_pictured_streams(
    model: Path = MINI, *, cases: int = 48, workers: int = 1, policy: str = RECOMPUTE
) -> dict[str, float]:
    """All figures at `MINI_STRENGTH`; each is a share of the cases, 0..1, but for those in dB."""
    started = list(spread_work(make_pictured_stream, start_jobs(cases, policy, model), workers))
    followed = list(spread_work(make_pictured_stream, video_jobs(cases, MINI_STRENGTH, policy, model), workers))
    identity = measure_identity(min(cases, 8), workers, policy, model)
    return start_image_figures(started) | video_figures(followed) | identity


def measure_identity(cases: int, workers: int, policy: str = RECOMPUTE, model: Path = MINI) -> dict[str, float]:
    """PSNR in dB of a stream at strength 0 and of the VAE alone, to what was drawn."""
    errors = list(spread_work(identity_errors, video_jobs(cases, 0.0, policy, model), workers))
    ours, vae = (sum(values) / len(values) for values in zip(*errors, strict=True))
    return {"video_identity_psnr_db": psnr_of(ours), "vae_psnr_db": psnr_of(vae)}


def _spread(items: Sequence[Scene], count: int) -> list[Scene]:
    order = torch.randperm(len(items), generator=torch.Generator().manual_seed(1)).tolist()
    return [items[place] for place in order[:count]]


def _place(number: int) -> tuple[float, float]:
    x, y = (torch.rand(2, generator=torch.Generator().manual_seed(number)) * SIZE).tolist()
    return x, y


def _wrapped(steps: torch.Tensor) -> torch.Tensor:
    """Steps in a world that wraps around."""
    return (steps + SIZE / 2).remainder(SIZE) - SIZE / 2


def _share(outcomes: Sequence[PicturedOutcome], aspect: str) -> float:
    return sum(bool(getattr(one, aspect)) for one in outcomes) / len(outcomes)


def main() -> None:
    """Run the program."""
    names = lambda text: tuple(text.split(","))  # noqa: E731
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=lambda text: Path(text).absolute(), default=MINI, help="pipeline folder")
    parser.add_argument("--only", type=names, default=PARTS, help=", ".join(PARTS))
    parser.add_argument("--policies", type=names, default=KV_POLICIES, help=", ".join(KV_POLICIES))
    parser.add_argument("--cases", type=int, default=48, help="of 144 scenes")
    floats = lambda text: tuple(map(float, text.split(",")))  # noqa: E731
    parser.add_argument("--strengths", type=floats, default=(MINI_STRENGTH,), help="of videos")
    parser.add_argument("--contradict", action="store_true", help="prompts name another direction than the clip's")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes; default: CPU cores")
    parser.add_argument("--json", type=Path, help="file for the figures")
    options = parser.parse_args()
    figures: dict[str, Any] = {}
    for policy in options.policies:
        found = figures[policy] = {}
        if "start" in options.only:
            jobs = start_jobs(options.cases, policy, options.model)
            found["start"] = start_image_figures(list(spread_work(make_pictured_stream, jobs, options.workers)))
            _say(policy, "start image", found["start"])
        if "identity" in options.only:
            found["identity"] = measure_identity(min(options.cases, 8), options.workers, policy, options.model)
            _say(policy, "strength 0", found["identity"])
        for strength in options.strengths if "video" in options.only else ():
            jobs = video_jobs(options.cases, strength, policy, options.model, contradict=options.contradict)
            name = f"video {strength:g}{' against the prompt' * options.contradict}"
            found[name] = video_figures(list(spread_work(make_pictured_stream, jobs, options.workers)))
            _say(policy, name, found[name])
        if options.json:
            options.json.write_text(json_text(figures, indent=1) + "\n")


def _say(policy: str, name: str, figures: dict[str, float]) -> None:
    shown = ", ".join(f"{key} {value:.3f}" for key, value in figures.items())
    print(f"{policy}, {name}: {shown}", flush=True)


if __name__ == "__main__":
    main()
