"""On a GPU: streams that are killed and resumed, or run out of memory, beside ones that nothing happened to.

    python benchmarks/card_faults.py [--size 1.3B] [--blocks 8] [--kills 2] [--compile] [--json]
    python benchmarks/card_faults.py --size tiny --device cpu

A pipeline with random weights is written to a temporary folder, and loaded by the pack's own code in every process.
*Killed*: a process saves its stream behind every second block and is ended by SIGKILL at a random moment; another one
goes on from the save. *Short of memory*: behind block 2 the memory that torch may take is cut to what is allocated and
a part of what blocks took beyond it, for one block or for good. There is no ComfyUI here and no video file; for these,
on a CPU, see `kill_and_resume.py`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import streamblocks_path  # noqa: F401
import torch
from full_size_models import SIZES
from small_cards import write_pipeline

from streamblocks.memory.cleanup import release_cached_memory
from streamblocks.stream.direction import Direction
from streamblocks.stream.materialise import materialise, release_materialised
from streamblocks.stream.recipe import Recipe
from streamblocks.stream.run_stream import run_stream
from streamblocks.stream.saved_folder import SavedFolder
from streamblocks.stream.saved_stream import SavedStream
from streamblocks.stream.session import Session
from streamblocks.stream.settings import StreamSettings

POLICIES = ("recompute", "rolling")
PROMPT, SAVE_EVERY, SHORT_BEHIND = "random weights", 2, 2
# Of what blocks take beyond what is held between them.
HEADROOMS = (0.7, 0.3, 0.05)


def digest(frames: torch.Tensor) -> str:
    """Of a block's pictures."""
    return hashlib.sha256(frames.numpy().tobytes()).hexdigest()


def settings_of(options: argparse.Namespace, policy: str) -> StreamSettings:
    """Of the streams here."""
    width, height = (32, 32) if options.size == "tiny" else (832, 480)
    return StreamSettings(width=width, height=height, blocks=options.blocks, kv_policy=policy, seed=7)


def stream_on(recipe: Recipe, settings: StreamSettings, folder: AnySaved | None) -> None:
    """Print each block's digest, saving on the way; goes on from what is saved."""
    pipeline = materialise(recipe)
    settings = pipeline.check_fit(settings)
    past = folder.load()[0].snapshot if folder is not None and folder.point_or_any() else None
    first = 0 if past is None else past.blocks_made
    with Session(pipeline, settings, going_on=past, first_block=first, keeps_latents=True) as session:
        for index in range(first, settings.blocks):
            print("block", index, digest(session.run_block(PROMPT).frames), flush=True)
            if folder is not None and (index + 1) % SAVE_EVERY == 0:
                folder.save(SavedStream(session.snapshot(lean=True), None))


class AnySaved(SavedFolder):
    """A folder whose snapshots belong to no run of the sampler."""

    def point_or_any(self) -> bool:
        """Whether there is one."""
        return self.path.exists() and bool(self.snapshots())


@dataclass
class Killed:
    """What became of one stream.

    Attributes:
        policy: of the stream.
        kills: that struck while it ran.
        made: blocks that its processes made, those made twice counted twice.
        equal: whether each is that of the stream that was never stopped, and none is missing.
    """

    policy: str
    kills: int
    made: int
    equal: bool


class Streams:
    """Runs of this program for one written pipeline.

    Args:
        place: of the pipeline.
        arguments: of the command line, for the other processes.
    """

    def __init__(self, place: Path, options: argparse.Namespace) -> None:
        self.place, self.options = place, options

    def begin(self, policy: str, saved: str) -> subprocess.Popen[str]:
        """Another process with a stream."""
        options = self.options
        told = [f"--size={options.size}", f"--device={options.device}", f"--blocks={options.blocks}"]
        command = [sys.executable, __file__, *told, "--child", str(self.place), policy, saved]
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)

    def whole(self, policy: str) -> tuple[dict[int, str], float]:
        """Digests of the stream that is never stopped, and its seconds from the first block on."""
        process = self.begin(policy, "")
        blocks: dict[int, str] = {}
        began = time.monotonic()
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("block 0"):
                began = time.monotonic()
            _note(blocks, line)
        if process.wait() or len(blocks) != self.options.blocks:
            raise RuntimeError("the stream itself failed")
        return blocks, time.monotonic() - began

    def killed(self, policy: str, known: dict[int, str], seconds: float, chance: random.Random) -> Killed:
        """Kill a stream some times, resume it, and compare."""
        folder = str(self.place / f"saved_{policy}")
        told = Killed(policy, 0, 0, True)
        seen: set[int] = set()
        for left in range(self.options.kills, -1, -1):
            process = self.begin(policy, folder)
            assert process.stdout is not None
            end = None
            for line in process.stdout:
                blocks: dict[int, str] = {}
                _note(blocks, line)
                for index, found in blocks.items():
                    told.made += 1
                    seen.add(index)
                    told.equal &= known[index] == found
                if blocks and left and end is None:
                    # Reading goes on: what it prints until then counts.
                    end = _kill_after(process, chance.uniform(0.0, seconds * 0.7))
            told.kills += process.wait() == -signal.SIGKILL
            if process.returncode == 0:
                break
        told.equal &= seen == set(known)
        return told


def _note(blocks: dict[int, str], line: str) -> None:
    word, *rest = line.split()
    if word == "block":
        blocks[int(rest[0])] = rest[1]


def _kill_after(process: subprocess.Popen[str], seconds: float) -> object:
    def kill() -> None:
        if process.poll() is None:
            os.kill(process.pid, signal.SIGKILL)

    timer = threading.Timer(seconds, kill)
    timer.daemon = True
    timer.start()
    return timer


class Shortage:
    """A watcher that leaves the stream less memory behind one of its blocks.

    Args:
        device: a GPU.
        extra: bytes beyond what is allocated then.
        lasts: whether the rest of the stream has no more; else the next block only.
    """

    def __init__(self, device: torch.device, extra: int, lasts: bool) -> None:
        self.rungs: list[tuple[int, str, str]] = []
        self._device, self._extra, self._lasts = device, extra, lasts

    def while_loading(self, component: str, done: int, total: int) -> None:
        """Nothing."""

    def before_pass(self, index: int) -> None:
        """Nothing."""

    def after_block(self, block: Any) -> None:  # noqa: ANN401
        """Cut the memory, or give it back."""
        made = block.index + 1
        if made == SHORT_BEHIND:
            release_cached_memory(self._device)
            cap_memory(self._device, torch.cuda.memory_reserved(self._device) + self._extra)
        elif made == SHORT_BEHIND + 1 and not self._lasts:
            cap_memory(self._device, None)

    def rung(self, block: int, stage: str, rung: str) -> None:
        """One that was taken."""
        self.rungs.append((block + 1, stage, rung))


class Seen:
    """A sink that keeps digests."""

    def __init__(self) -> None:
        self.blocks: list[str] = []

    def write(self, frames: torch.Tensor) -> None:
        """Note a block."""
        self.blocks.append(digest(frames))

    def close(self) -> None:
        """Nothing."""


def cap_memory(device: torch.device, most: int | None) -> None:
    """How many bytes torch may take; None for all."""
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction(1.0 if most is None else min(1.0, most / total), device)


def run_short(recipe: Recipe, settings: StreamSettings, share: float, lasts: bool, beyond: int) -> dict[str, Any]:
    """A stream with `share` of the memory that a block takes beyond what is held."""
    device = torch.device("cuda", torch.cuda.current_device())
    watcher = Shortage(device, int(share * beyond), lasts)
    sink = Seen()
    error = ""
    torch.cuda.reset_peak_memory_stats(device)
    pipeline = materialise(recipe)
    try:
        report = run_stream(pipeline, settings, Direction.constant(PROMPT), [sink], watcher, on_rung=watcher.rung)
        notices = [text for text in report.notices if "memory" in text]
    except torch.OutOfMemoryError as failed:
        notices, error = [], str(failed)[:300]
    finally:
        cap_memory(device, None)
    return {
        "share": share, "lasts": lasts, "blocks": sink.blocks, "rungs": watcher.rungs, "notices": notices,
        "error": error,
    }  # fmt: skip


def short_of_memory(recipe: Recipe, options: argparse.Namespace) -> bool:
    """Streams with less and less memory; prints a line for each, and returns whether no block was lost."""
    good = True
    for policy in POLICIES:
        settings = replace(settings_of(options, policy), blocks=5)
        # The first one compiles and warms up; what a block takes is seen by the second.
        run_short(recipe, settings, 100.0, True, 2**30)
        device = torch.device("cuda", torch.cuda.current_device())
        torch.cuda.reset_peak_memory_stats(device)
        known = run_short(recipe, settings, 100.0, True, 2**30)["blocks"]
        pipeline = materialise(recipe)
        held = torch.cuda.memory_allocated(device)
        beyond = torch.cuda.max_memory_reserved(device) - held
        print(
            f"{policy}: {held / 2**30:.2f} GiB held behind a stream, {beyond / 2**30:.2f} more at its peak", flush=True
        )
        for share in HEADROOMS:
            for lasts in (False, True):
                told = run_short(recipe, settings, share, lasts, beyond)
                same = [one == other for one, other in zip(told["blocks"], known, strict=False)]
                good &= len(told["blocks"]) >= SHORT_BEHIND and all(same[:SHORT_BEHIND])
                taken = ", ".join(f"{block}: {rung} ({stage})" for block, stage, rung in told["rungs"]) or "none"
                print(
                    f"  {share:4.0%} {'for good' if lasts else 'one block'}: {len(same)} of {settings.blocks} blocks, "
                    f"{sum(same)} bitwise; rungs {taken}; {told['notices'][-1] if told['notices'] else told['error']}",
                    flush=True,
                )
                # What a stream did for want of memory may stay with its pipeline.
                release_materialised()
        del pipeline
    return good


def main() -> int:
    """Run, and print what was equal."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=tuple(SIZES), default="1.3B")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--blocks", type=int, default=8)
    parser.add_argument("--kills", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        place, policy, saved = options.child
        recipe = Recipe(**json.loads((Path(place) / "recipe.json").read_text()))
        stream_on(recipe, settings_of(options, policy), AnySaved(Path(saved)) if saved else None)
        return 0
    size = SIZES[options.size]
    # The streams here have one prompt: a text encoder of two layers and few words gives an embedding of the right size.
    size = replace(size, text={**size.text, "num_layers": 2, "vocab_size": 384})
    chance = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as folder:
        recipe = write_pipeline(Path(folder), size, torch.device(options.device), options.compile)
        told = {name: getattr(recipe, name) for name in ("model", "components", "device", "compile")}
        (Path(folder) / "recipe.json").write_text(json.dumps(told))
        good = True if options.device == "cpu" else short_of_memory(recipe, options)
        release_materialised()
        streams = Streams(Path(folder), options)
        runs = []
        for policy in POLICIES:
            runs.append(streams.killed(policy, *streams.whole(policy), chance))
            if not options.json:
                print(runs[-1], flush=True)
    equal = sum(run.equal for run in runs)
    print(json.dumps({"runs": len(runs), "resumed_equal": equal, "kills": sum(run.kills for run in runs)}))
    return 0 if good and equal == len(runs) else 1


if __name__ == "__main__":
    sys.exit(main())
