"""Kill streams with SIGKILL at random moments, resume them, and compare with streams that were never stopped.

python benchmarks/kill_and_resume.py --runs 10 --json

Each run is a stream of 20 blocks of the small random model, in the embedded host, on the CPU: with `recompute` or
`rolling`, with or without an input video, in turn. It is killed up to `--kills` times, each time at a random moment
between its beginning and its end, and resumed by the sampler's own input. A run is equal when every block that any of
its processes has made has the pictures of the stream that was never stopped, when none is missing, when the finished
video is decoded to the same pictures, bit for bit, and when no stream to resume is left.

With `--comfyui` it is a real ComfyUI that is killed: the server's process, which is then started anew. There only the
finished videos are compared.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from killed_comfyui import ServerTrial
from killed_prompt import BLOCKS, NEW, RESUMED, SCENARIOS, SEED, decoded_digests, differences, write_input

HERE = Path(__file__).resolve().parent
# Of the kills.
_WHILE_LOADING = 0.1


@dataclass
class Nursery:
    """A process that forks streams; started anew, it is what a restarted ComfyUI is.

    Attributes:
        base: ComfyUI's folders.
    """

    base: Path
    process: subprocess.Popen[str] | None = None

    def start(self) -> None:
        """Start it, ending the one before."""
        self.stop()
        environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        self.process = subprocess.Popen(
            [sys.executable, str(HERE / "killed_streams.py"), str(self.base)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=(self.base / "errors.txt").open("a"), text=True,
            env=environment,
        )  # fmt: skip
        self._await("READY")

    def begin(self, request: dict[str, Any]) -> int:
        """Have a stream begun; returns its pid."""
        self._ask(json.dumps(request))
        return int(self._await("PID"))

    def ended(self) -> int:
        """Wait for the end of the stream; returns the status of `waitpid`."""
        self._ask("wait")
        return int(self._await("ENDED"))

    def stop(self) -> None:
        """End it."""
        if self.process is not None:
            assert self.process.stdin is not None
            self.process.stdin.close()
            self.process.wait()

    def _ask(self, line: str) -> None:
        assert self.process is not None and self.process.stdin is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()

    def _await(self, word: str) -> str:
        assert self.process is not None and self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith(word):
                return line.removeprefix(word).strip()
        raise RuntimeError(f"the process has ended: see {self.base / 'errors.txt'}")


@dataclass
class Log:
    """What a stream's processes have noted.

    Attributes:
        path: of the file.
        blocks: each time a block was made: its index, pictures and digest.
        video: the finished file; "" where there is none.
        went_on: processes that went on behind a block of another.
    """

    path: Path
    blocks: list[tuple[int, int, str]] = field(default_factory=list)
    video: str = ""
    went_on: int = 0

    def await_blocks(self, count: int) -> None:
        """Wait until so many blocks are noted, or the stream must have failed."""
        end = time.monotonic() + 120
        while len(self.read().blocks) < count and time.monotonic() < end:
            time.sleep(0.01)

    def read(self) -> Log:
        """Read it."""
        self.blocks, self.video, self.went_on = [], "", 0
        if not self.path.exists():
            return self
        first = False
        for line in self.path.read_text().splitlines():
            kind, _, rest = line.partition(" ")
            if kind == "video":
                self.video = rest
            elif kind != "begins":
                count, _, digest = rest.partition(" ")
                self.blocks.append((int(kind), int(count), digest))
                self.went_on += first and int(kind) > 0
            first = kind == "begins"
        return self


class Trial:
    """Streams of one folder.

    Args:
        base: ComfyUI's folders.
        arguments: of the command line.
    """

    def __init__(self, base: Path, arguments: argparse.Namespace) -> None:
        self.base = base
        self.nursery = Nursery(base)
        self.random = random.Random(arguments.seed)
        self.kills, self.fresh, self.save_every = arguments.kills, arguments.fresh, arguments.save_every
        self.large_saves = arguments.large_saves
        self.killed = self.in_stream = self.went_on = 0
        self._whole: dict[tuple[str, bool], tuple[Log, float]] = {}
        write_input(base / "input.mp4")
        self.nursery.start()

    def request(self, name: str, scenario: tuple[str, bool], resume: str, save_every: int) -> dict[str, Any]:
        """What a process is asked for."""
        policy, video = scenario
        return {
            "name": name, "policy": policy, "video": str(self.base / "input.mp4") if video else "", "blocks": BLOCKS,
            "seed": SEED, "save_every": save_every, "resume": resume, "log": str(self.base / f"{name}.log"),
            "large_saves": self.large_saves,
        }  # fmt: skip

    def whole(self, scenario: tuple[str, bool]) -> tuple[Log, float]:
        """The stream that is never stopped, made once, without saves; and how many seconds it takes."""
        if scenario not in self._whole:
            name = f"whole_{scenario[0]}_{scenario[1]}"
            log = Log(self.base / f"{name}.log")
            self.nursery.begin(self.request(name, scenario, NEW, 0))
            log.await_blocks(1)
            began = time.monotonic()
            status = self.nursery.ended()
            log.read()
            if status or len(log.blocks) != BLOCKS:
                raise RuntimeError(f"the stream itself failed: {(self.base / 'errors.txt').read_text()[-3000:]}")
            self._whole[scenario] = log, time.monotonic() - began
        return self._whole[scenario]

    def run(self, index: int) -> Iterator[str]:
        """One run; yields a sentence for each thing that is wrong."""
        scenario = SCENARIOS[index % len(SCENARIOS)]
        expected, seconds = self.whole(scenario)
        name = f"run{index}"
        log = Log(self.base / f"{name}.log")
        resume = NEW
        for _ in range(self.kills):
            there = len(log.read().blocks)
            pid = self.nursery.begin(self.request(name, scenario, resume, self.save_every))
            if self.random.random() < _WHILE_LOADING:
                time.sleep(self.random.uniform(0.0, 0.2))
            else:
                log.await_blocks(there + 1)
                time.sleep(self.random.uniform(0.0, 1.0) * seconds * (1 - len({one[0] for one in log.blocks}) / BLOCKS))
            # A zombie, if it has ended: its parent waits for it when it is asked to.
            os.kill(pid, signal.SIGKILL)
            was_killed = os.WIFSIGNALED(self.nursery.ended())
            self.killed += was_killed
            self.in_stream += was_killed and len(log.read().blocks) > there and not log.video
            resume = RESUMED
            if self.fresh:
                self.nursery.start()
            if not was_killed:
                break
        if not log.read().video:
            self.nursery.begin(self.request(name, scenario, resume, self.save_every))
            if self.nursery.ended():
                yield f"{name}: the resumed stream failed"
        self.went_on += log.read().went_on
        yield from self._differences(name, log, expected)

    def stop(self) -> None:
        """End what was started."""
        self.nursery.stop()

    def errors(self) -> str:
        """What the processes have printed."""
        return (self.base / "errors.txt").read_text()

    def killed_so(self) -> str:
        """A sentence on the kills."""
        return (
            f"{self.killed} processes killed, {self.in_stream} of them between their first block and the end of their "
            f"stream; {self.went_on} went on behind a block of another."
        )

    def _differences(self, name: str, log: Log, expected: Log) -> Iterator[str]:
        known = {index: (count, digest) for index, count, digest in expected.blocks}
        yield from (f"{name}: block {index} differs" for index, *rest in log.blocks if known[index] != tuple(rest))
        made = {index for index, *_ in log.blocks}
        yield from (f"{name}: block {index} is missing" for index in known if index not in made)
        yield from differences(name, log.video, decoded_digests(expected.video))
        # A video without a snapshot is of a process that was killed between the two.
        left = [str(path) for path in (self.base / "output/streamblocks/unfinished").glob("*/*.safetensors")]
        if left:
            yield f"{name}: left behind: {left}"


def main() -> int:
    """Run, and print what was equal."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--kills", type=int, default=2, help="of each run, at most")
    parser.add_argument("--save-every", type=int, default=3, help="blocks")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--fresh", action="store_true", help="import everything anew after each kill (seconds each)")
    parser.add_argument("--large-saves", action="store_true", help="write saves beside the stream, as large ones are")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--comfyui", action="store_true", help="kill a real ComfyUI (minutes)")
    arguments = parser.parse_args()
    equal = 0
    with tempfile.TemporaryDirectory() as folder:
        trial = (ServerTrial if arguments.comfyui else Trial)(Path(folder), arguments)
        try:
            for index in range(arguments.runs):
                began = time.monotonic()
                wrong = list(trial.run(index))
                equal += not wrong
                if not arguments.json:
                    print(
                        f"run {index}: {'equal' if not wrong else 'wrong'}, {time.monotonic() - began:.0f} s",
                        flush=True,
                    )
                for sentence in wrong:
                    print(sentence, file=sys.stderr)
        finally:
            trial.stop()
        if equal < arguments.runs:
            print(trial.errors()[-4000:], file=sys.stderr)
    print(trial.killed_so(), file=sys.stderr)
    figures = {"runs": arguments.runs, "resumed_equal": equal}
    print(json.dumps(figures) if arguments.json else figures)
    return 0 if equal == arguments.runs else 1


if __name__ == "__main__":
    sys.exit(main())
