"""Does a long stream hold at its end what it held near its beginning: tensors, files, threads, anonymous memory?"""

from __future__ import annotations

import argparse
import gc
import json
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import streamblocks_path  # noqa: F401
import torch

from streamblocks.families.kv_policies import KV_POLICIES, RECOMPUTE
from streamblocks.memory.tensor_bytes import live_tensor_bytes
from streamblocks.stream.direction import Direction
from streamblocks.stream.materialise import materialise
from streamblocks.stream.recipe import Recipe
from streamblocks.stream.run_stream import run_stream
from streamblocks.stream.session import StreamBlock
from streamblocks.stream.settings import StreamSettings
from streamblocks.stream.sinks import FrameKeeper, FrameSink, KeepFrames, Mp4Sink
from streamblocks.wan.tiny_model import write_tiny_model

# By then caches are full, allocators warm, and every kind of block was made.
FIRST_LOOK = 100
# A prompt is encoded at each change, and two alternate.
PROMPTS = ("a calm sea", "a stormy sea")
BLOCKS_PER_PROMPT = 25


@dataclass(frozen=True)
class Held:
    """What the process holds behind a block, after a garbage collection.

    Attributes:
        block: counted from 1.
        tensor_bytes: of all live tensors.
        files: open file descriptors.
        threads: of the process, Python's own or not.
        anonymous_bytes: resident memory that belongs to no file.
    """

    block: int
    tensor_bytes: int
    files: int
    threads: int
    anonymous_bytes: int

    @classmethod
    def now(cls, block: int) -> Held:
        """Read from /proc: Linux only."""
        gc.collect()
        status = Path("/proc/self/status").read_text(encoding="utf-8")
        fields = dict(line.split(":", 1) for line in status.splitlines())
        files = len(list(Path("/proc/self/fd").iterdir()))
        anonymous = int(fields["RssAnon"].split()[0]) * 1024
        return cls(block, live_tensor_bytes(), files, int(fields["Threads"]), anonymous)


class _Looker:
    """A watcher that looks at what is held."""

    def __init__(self, every: int) -> None:
        self.seen: list[Held] = []
        self._every = every

    def while_loading(self, component: str, done: int, total: int) -> None:
        """Nothing."""

    def before_pass(self, index: int) -> None:
        """Nothing."""

    def after_block(self, block: StreamBlock) -> None:
        """Look at every so many blocks."""
        made = block.index + 1
        if made % self._every == 0:
            self.seen.append(Held.now(made))


def hold(blocks: int, kv_policy: str, folder: Path) -> list[Held]:
    """Make a stream of the tiny model into an mp4 in `folder`, one pass a block; what was held on the way."""
    pipeline = materialise(Recipe(str(write_tiny_model(folder / "tiny"))))
    settings = StreamSettings(width=32, height=32, blocks=blocks, steps=1, kv_policy=kv_policy, context_frames=3)
    sinks: list[FrameSink] = [Mp4Sink(folder / "long.mp4"), FrameKeeper(KeepFrames.LAST_BLOCK)]
    looker = _Looker(FIRST_LOOK)
    direction = Direction(lambda index: PROMPTS[index // BLOCKS_PER_PROMPT % len(PROMPTS)])
    run_stream(pipeline, settings, direction, sinks, looker)
    return looker.seen


def main(arguments: Sequence[str] | None = None) -> int:
    """Print what was held; 1 if there is more of it at the end."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--blocks", type=int, default=2000)
    parser.add_argument("--policy", choices=KV_POLICIES, default=RECOMPUTE)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args(arguments)
    if options.blocks < 2 * FIRST_LOOK:
        parser.error(f"--blocks is {options.blocks}: choose {2 * FIRST_LOOK} or more.")
    torch.set_num_threads(1)
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        seen = hold(options.blocks, options.policy, Path(folder))
    first, last = seen[0], seen[-1]
    told = {
        "blocks": options.blocks,
        "policy": options.policy,
        "first": asdict(first),
        "last": asdict(last),
        "most_anonymous_bytes": max(held.anonymous_bytes for held in seen),
        "grown": {name: getattr(last, name) - getattr(first, name) for name in asdict(first) if name != "block"},
        "python_threads": threading.active_count(),
        "seconds": round(time.perf_counter() - began, 1),
    }
    if options.json:
        print(json.dumps(told))
    else:
        for held in seen:
            print(held)
    grown = told["grown"]
    assert isinstance(grown, dict)
    return int(any(grown[name] > 0 for name in ("tensor_bytes", "files", "threads")))


if __name__ == "__main__":
    raise SystemExit(main())
