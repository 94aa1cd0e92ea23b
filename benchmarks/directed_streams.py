"""Streams of the mini model along a prompt track: what changes when, and how smoothly.

    python benchmarks/directed_streams.py --cases 48 --json directed.json

`quality.py` calls `measure_track` and `measure_transition` of this module. A case changes colour and shape; it counts
as right where the block before the change shows all of the old caption, and the first block after it all of the new.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import streamblocks_path
import torch
from drawn_truth import Seen, see
from picture_differences import jumps, seam_jumps
from worker_processes import spread_work

from streamblocks.families.kv_policies import KEEP_KEYS, RECOMPUTE, RECOMPUTE_KEYS, ROLLING
from streamblocks.memory.json_text import json_text
from streamblocks.stream.block_prompt import LINEAR
from streamblocks.stream.materialise import materialise
from streamblocks.stream.prompt_track import PromptTrack
from streamblocks.stream.recipe import Recipe
from streamblocks.stream.session import Session
from streamblocks.stream.settings import StreamSettings
from streamblocks.tools.train_mini.clips import SIZE
from streamblocks.tools.train_mini.scenes import COLORS, SHAPES, Scene, all_scenes, another_of, plain_caption

MINI = streamblocks_path.ROOT / "models" / "mini"
# Under "recompute" both choices are the same.
CHOICES = {
    "recompute": (RECOMPUTE, KEEP_KEYS),
    "rolling, keep keys": (ROLLING, KEEP_KEYS),
    "rolling, recompute keys": (ROLLING, RECOMPUTE_KEYS),
}
TRANSITION_BLOCKS = 4
_CHANGED_AT, _BLOCKS_AFTER = 3, 2
_FIRST_SEED = 2_000_000


@dataclass(frozen=True)
class DirectedJob:
    """One stream along a track.

    Attributes:
        track: as users write it.
        blocks: of the stream.
        seed: of its noise; none was used in training.
        choice: a key of `CHOICES`.
        interpolation: of mixed prompts.
        model: folder of the pipeline.
    """

    track: str
    blocks: int
    seed: int
    choice: str = "recompute"
    interpolation: str = LINEAR
    model: str = str(MINI)


@dataclass(frozen=True)
class DirectedOutcome:
    """What a stream along a track showed.

    Attributes:
        seen: in each block.
        inside: per block, mean absolute differences (0..1) between neighbouring pictures.
        seams: the same between the last picture of each block and the first of the next.
        frames: per block, uint8 [pictures, 64, 64, 3].
    """

    seen: tuple[Seen, ...]
    inside: tuple[tuple[float, ...], ...]
    seams: tuple[float, ...]
    frames: tuple[torch.Tensor, ...]


def make_directed(jobs: Sequence[DirectedJob], workers: int) -> Iterator[DirectedOutcome]:
    """Outcomes in the order of `jobs`, made by as many processes of one thread each."""
    return spread_work(make_one, jobs, workers)


def make_one(job: DirectedJob) -> DirectedOutcome:
    """Make one stream and look at it."""
    policy, on_change = CHOICES[job.choice]
    settings = StreamSettings(
        width=SIZE, height=SIZE, blocks=job.blocks, seed=job.seed, kv_policy=policy, on_prompt_change=on_change
    )
    track = PromptTrack.parse(job.track, job.interpolation).place(job.blocks, None)
    pipeline = materialise(Recipe(job.model, dtype="float32"))
    with Session(pipeline, settings, prompts_ahead=track.texts) as session:
        blocks = [session.run_block(track.at(index)).frames for index in range(job.blocks)]
    return DirectedOutcome(
        seen=tuple(see(block) for block in blocks),
        inside=tuple(tuple(jumps(block)) for block in blocks),
        seams=seam_jumps(blocks),
        frames=tuple(blocks),
    )


def measure_track(
    choice: str, cases: int, *, cut: bool = False, workers: int = 1, model: Path = MINI
) -> dict[str, float]:
    """How often a change shows at its block, and one block later, over `cases` changes of colour and shape."""
    pairs = changed_scenes(cases)
    mark = " cut" if cut else ""
    jobs = [
        DirectedJob(
            f"0: {plain_caption(before)}\n{_CHANGED_AT}{mark}: {plain_caption(after)}",
            _CHANGED_AT + _BLOCKS_AFTER,
            _FIRST_SEED + number,
            choice,
            model=str(model),
        )
        for number, (before, after) in enumerate(pairs)
    ]
    at_once, later, seams, inside = 0, 0, 0.0, 0.0
    for (before, after), outcome in zip(pairs, make_directed(jobs, workers), strict=True):
        kept = outcome.seen[_CHANGED_AT - 1] == seen_of(before)
        at_once += kept and outcome.seen[_CHANGED_AT] == seen_of(after)
        later += kept and outcome.seen[_CHANGED_AT + 1] == seen_of(after)
        seams += outcome.seams[_CHANGED_AT - 1]
        inside += _mean([jump for block in outcome.inside for jump in block])
    return {
        "track_accuracy": at_once / cases,
        "track_accuracy_one_block_later": later / cases,
        "seam_ratio_change": seams / inside,
    }


def measure_transition(
    choice: str, cases: int, *, interpolation: str = LINEAR, workers: int = 1, model: Path = MINI
) -> dict[str, float | list[float]]:
    """Jumps at the seams of a transition over 4 blocks, as a multiple of those inside its blocks.

    The seams are those before each of its blocks, and the one behind the last.
    """
    pairs = changed_scenes(cases)
    first, last = _CHANGED_AT, _CHANGED_AT + TRANSITION_BLOCKS - 1
    jobs = [
        DirectedJob(
            f"0: {plain_caption(before)}\n{first}->{last}: {plain_caption(after)}",
            last + 2,
            _FIRST_SEED + number,
            choice,
            interpolation,
            str(model),
        )
        for number, (before, after) in enumerate(pairs)
    ]
    outcomes = list(make_directed(jobs, workers))
    seams = [_mean([outcome.seams[place - 1] for outcome in outcomes]) for place in range(first, last + 2)]
    inside = _mean([jump for outcome in outcomes for block in outcome.inside[first : last + 1] for jump in block])
    arrived = [outcome.seen[last] == seen_of(after) for (_, after), outcome in zip(pairs, outcomes, strict=True)]
    return {
        "seam_ratio_transition": _mean(seams) / inside,
        "seam_ratio_by_seam": [round(seam / inside, 3) for seam in seams],
        "transition_arrived": sum(arrived) / cases,
    }


def changed_scenes(cases: int) -> list[tuple[Scene, Scene]]:
    """Scenes in a fixed random order, each with another of another colour and shape."""
    scenes = all_scenes()
    order = torch.randperm(len(scenes), generator=torch.Generator().manual_seed(0)).tolist()
    pairs = []
    for number, place in enumerate(order[:cases]):
        scene = scenes[place]
        other = replace(
            scene, color=another_of(COLORS, scene.color, number), shape=another_of(SHAPES, scene.shape, number)
        )
        pairs.append((scene, other))
    return pairs


def seen_of(scene: Scene) -> Seen:
    """What the checker reads where a scene is shown."""
    return Seen(scene.color, scene.shape, scene.direction)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def main() -> None:
    """Every choice, as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=48)
    parser.add_argument("--transition-cases", type=int, default=16)
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    figures: dict[str, Any] = {}
    for choice in CHOICES:
        figures[choice] = measure_track(choice, options.cases, workers=options.workers)
        figures[choice] |= measure_transition(choice, options.transition_cases, workers=options.workers)
        print(choice, json_text(figures[choice]), flush=True)
    figures["cut"] = measure_track("recompute", options.cases, cut=True, workers=options.workers)
    print("cut", json_text(figures["cut"]), flush=True)
    if options.json:
        options.json.write_text(json_text(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
