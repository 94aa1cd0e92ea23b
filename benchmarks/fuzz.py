"""Gives every parser of the pack hostile inputs, and counts what should not have happened.

    python benchmarks/fuzz.py [--inputs 100000] [--seed 0] [--workers 1] [--target NAME] [--findings FILE] [--json]

Inputs are made of good ones by a generator of their own, so an input is known by its number. They are read in worker
processes, which are started again when they die. A call should take under a second of processor time and 64 MiB of
memory, and end with a value, or with an error that says in one sentence what is wrong and where.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import logging
import mmap
import os
import resource
import struct
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from typing import Any

SECONDS, MEGABYTES = 1.0, 64
# A worker that takes this long is ended; inputs that take less than it and more than SECONDS are counted by itself.
_SECONDS_TO_END = 10.0
# Address space beyond what a worker has when it is ready, so that no input takes the machine's memory.
_SPACE = 6 * 2**30
_STATE = struct.Struct("<qq")
_OUTCOMES = ("crashes", "hangs", "over_memory", "unclear_errors")


@dataclass
class FuzzFigures:
    """What happened; all but the first should be 0.

    Attributes:
        inputs: that were read.
        crashes: processes that ended.
        hangs: calls of more than a second of processor time.
        over_memory: calls that took more than 64 MiB.
        unclear_errors: errors that are not the pack's own, do not name what is wrong, or are no single sentence.
    """

    inputs: int = 0
    crashes: int = 0
    hangs: int = 0
    over_memory: int = 0
    unclear_errors: int = 0


class Meter:
    """The largest memory of this process, from a beginning on."""

    def give_back(self) -> None:
        """Collect garbage, and give the C library's free memory to the system, so that it is counted when used."""
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)

    def begin(self) -> None:
        """Forget what was before."""
        Path("/proc/self/clear_refs").write_text("5")
        self._before = self._read("VmRSS")
        self._clock = time.process_time()

    def end(self) -> tuple[float, float]:
        """Seconds of processor time, and MiB at the most."""
        seconds = time.process_time() - self._clock
        return seconds, (self._read("VmHWM") - self._before) / 1024

    @staticmethod
    def _read(name: str) -> int:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(name):
                return int(line.split()[1])
        raise LookupError(name)


def run_worker(first: int, step: int, end: int, seed: int, only: str, state: Path, findings: Path) -> None:
    """Read the inputs `first`, `first + step` and so on up to `end`; how far is written to `state`."""
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    # Beside fuzz_targets, so that their imports are not measured.
    from fuzz_targets import make_targets

    targets = [target for target in make_targets() if only in ("", target.name)]
    wheel = [target for target in targets for _ in range(target.share)]
    meter = Meter()
    with (
        tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as place,
        findings.open("a") as found,
        state.open("r+b") as file,
        mmap.mmap(file.fileno(), _STATE.size) as shared,
    ):
        folders = {target.name: Path(place) / target.name.replace(" ", "_") for target in targets}
        for target in targets:
            folders[target.name].mkdir()
            target.prepare(folders[target.name])
            for number in range(20):
                read_input(target, Random(f"warm {number}"), folders[target.name], meter)
        gc.collect()
        gc.freeze()
        _limit_space()
        for number in range(first, end, step):
            _STATE.pack_into(shared, 0, number, time.monotonic_ns())
            target = wheel[Random(f"{seed} {number}").randrange(len(wheel))]
            outcome, message = read_input(target, Random(f"{seed} {number} x"), folders[target.name], meter)
            if outcome in ("hangs", "over_memory"):
                # Once more: a library that was imported, or a collection of garbage, is no fault of the input.
                meter.give_back()
                outcome, message = read_input(target, Random(f"{seed} {number} x"), folders[target.name], meter)
            if outcome:
                found.write(
                    json.dumps({"input": number, "target": target.name, "what": outcome, "said": message}) + "\n"
                )
                found.flush()
        _STATE.pack_into(shared, 0, end, time.monotonic_ns())


def _limit_space() -> None:
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + _SPACE, used + _SPACE))


def read_input(target: Any, random: Random, folder: Path, meter: Meter) -> tuple[str, str]:  # noqa: ANN401
    """What should not have happened, or nothing, and the error's text."""
    target.write(random, folder)
    message, unclear = "", False
    meter.begin()
    try:
        target.call(folder)
    except MemoryError as error:
        return "over_memory", repr(error)
    except Exception as error:
        unclear = not target.is_clear(error, folder)
        message = f"{type(error).__name__}: {error}"[:500]
    seconds, megabytes = meter.end()
    if seconds > SECONDS:
        return "hangs", f"{seconds:.2f} s {message}"
    if megabytes > MEGABYTES:
        return "over_memory", f"{megabytes:.0f} MiB {message}"
    return ("unclear_errors" if unclear else ""), message


def _supervise(number: int, workers: int, options: argparse.Namespace, folder: Path) -> Path:
    """Run one worker to its end, however often it must be started; the file with its findings."""
    state, findings = folder / f"state {number}", folder / f"findings {number}"
    findings.touch()
    first = number
    while first < options.inputs:
        state.write_bytes(_STATE.pack(first, 0))
        command = [sys.executable, __file__, "--worker", str(first), str(workers), str(state), str(findings)]
        command += ["--inputs", str(options.inputs), "--seed", str(options.seed), "--target", options.target]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
        with subprocess.Popen(
            command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        ) as process:
            hung = _watch(process, state)
        reached, begun = _STATE.unpack(state.read_bytes())
        if reached >= options.inputs:
            break
        if not begun:
            raise RuntimeError(f"the worker did not start: run {' '.join(command)} to see why.")
        what = "hangs" if hung else "crashes"
        with findings.open("a") as file:
            file.write(json.dumps({"input": reached, "what": what, "said": f"ended with {process.returncode}"}) + "\n")
        first = reached + workers
    return findings


def _watch(process: subprocess.Popen[bytes], state: Path) -> bool:
    """Wait for the worker's end; whether one input took so much processor time that it was ended."""
    seen, clock = -1, 0.0
    while process.poll() is None:
        time.sleep(0.5)
        number, begun = _STATE.unpack(state.read_bytes())
        try:
            used = sum(map(int, Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[11:13])) / 100
        except (OSError, ValueError):
            continue
        if number != seen or not begun:
            seen, clock = number, used
        # Waiting, such as for a pipe, takes no processor time.
        waits = begun and time.monotonic_ns() - begun > 60e9
        if used - clock > _SECONDS_TO_END or waits:
            process.kill()
            process.wait()
            return True
    return False


def fuzz(options: argparse.Namespace) -> tuple[FuzzFigures, list[dict[str, Any]]]:
    """Read all inputs; the figures, and each input that something was found with."""
    from concurrent.futures import ThreadPoolExecutor

    with tempfile.TemporaryDirectory() as place, ThreadPoolExecutor(options.workers) as pool:
        runs = [
            pool.submit(_supervise, number, options.workers, options, Path(place)) for number in range(options.workers)
        ]
        found = [json.loads(line) for run in runs for line in run.result().read_text().splitlines()]
    counts = Counter(entry["what"] for entry in found)
    figures = FuzzFigures(options.inputs, *(counts[what] for what in _OUTCOMES))
    if not options.target:
        _add_routes(figures, options)
    return figures, found


def _add_routes(figures: FuzzFigures, options: argparse.Namespace) -> None:
    """The bodies of requests, a tenth as many, by the benchmark of the pack's routes; nothing where there is none."""
    import streamblocks_path  # noqa: F401

    try:
        from fuzz_routes import fuzz_routes
    except ModuleNotFoundError as error:
        if error.name != "fuzz_routes":
            raise
        return
    routes, _ = fuzz_routes(max(1, options.inputs // 10), options.seed)
    figures.inputs += routes.bodies
    figures.crashes += routes.crashes + routes.server_errors
    # What was accepted or refused wrongly, no answer told clearly.
    figures.unclear_errors += routes.wrongly_accepted + routes.wrongly_refused
    figures.unclear_errors += routes.changed_without_token + routes.allowed_without_showing
    figures.hangs += routes.hangs_over_1_s


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--inputs", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--target", default="", help="only this one")
    parser.add_argument("--findings", type=Path, help="write each finding to this file, as lines of JSON")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    parser.add_argument("--worker", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        first, step, state, findings = options.worker
        run_worker(int(first), int(step), options.inputs, options.seed, options.target, Path(state), Path(findings))
        return
    figures, found = fuzz(options)
    if options.findings is not None:
        options.findings.write_text("".join(json.dumps(entry) + "\n" for entry in found))
    if options.json:
        print(json.dumps(asdict(figures)))
        return
    for entry in found[:50]:
        print(entry)
    print(figures)


if __name__ == "__main__":
    main()
