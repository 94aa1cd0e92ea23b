"""Kills a real ComfyUI while a stream runs, starts it anew, and queues the stream again, for `kill_and_resume.py`."""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import streamblocks_path
from killed_prompt import (
    BLOCKS,
    MODEL,
    NEW,
    RESUMED,
    SCENARIOS,
    SEED,
    VIDEO,
    decoded_digests,
    defaults_of,
    differences,
    prompt_of,
    write_input,
)

from streamblocks.wan.tiny_model import write_tiny_model

sys.path.insert(0, str(streamblocks_path.ROOT / "tests"))

from comfyui_server import ComfyUIServer

INPUT = "input.mp4"
# Key of the node that shows the sampler's settings output.
SHOWN = "6"
# Of the kills.
_WHILE_LOADING = 0.1
_PATIENCE = 300.0


class ServerTrial:
    """Streams of one base folder of ComfyUI.

    Args:
        base: of ComfyUI's folders.
        arguments: of the command line.

    Attributes:
        killed: servers.
        in_stream: of these, those killed between a block and the end of a stream.
        went_on: prompts that went on behind a block of another server.
    """

    def __init__(self, base: Path, arguments: argparse.Namespace) -> None:
        self.killed = self.in_stream = self.went_on = 0
        self._base = base
        self._random = random.Random(arguments.seed)
        self._kills, self._save_every = arguments.kills, arguments.save_every
        self._whole: dict[tuple[str, bool], tuple[list[str], float]] = {}
        self._model = write_tiny_model(base / "tiny")
        self._moments: list[str] = []
        os.environ["OMP_NUM_THREADS"] = "1"
        (base / "input").mkdir()
        write_input(base / "input" / INPUT)
        self._server = self._started()

    def run(self, index: int) -> Iterator[str]:
        """One run; yields a sentence for each thing that is wrong."""
        scenario = SCENARIOS[index % len(SCENARIOS)]
        wanted, seconds = self._made_whole(scenario)
        # With a page's workflow or, as a program queues it, without one.
        workflow = {"id": f"run{index}", "nodes": []} if index // len(SCENARIOS) % 2 == 0 else None
        resume, entry = NEW, None
        for _ in range(self._kills):
            began = time.time()
            queued = self._server.queue(self._prompt(f"run{index}", scenario, resume, self._save_every), workflow)
            self._await_moment(queued, began, seconds)
            entry = self._server.get(f"/history/{queued}").get(queued)
            if entry is not None:
                break
            self._kill(index)
            resume = RESUMED
        if entry is None:
            queued = self._server.queue(self._prompt(f"run{index}", scenario, resume, self._save_every), workflow)
        entry = self._server.wait(queued, _PATIENCE)
        self.went_on += "went on behind block" in json.dumps(entry["outputs"][SHOWN])
        yield from differences(f"run{index}", self._file(entry), wanted)
        left = [str(path) for path in self._unfinished().glob("*/*")]
        if any(path.endswith(".safetensors") for path in left):
            yield f"run{index}: left behind: {left}"

    def stop(self) -> None:
        """End the server."""
        self._server.stop()

    def errors(self) -> str:
        """What the last server has printed."""
        return self._server.log_text()

    def killed_so(self) -> str:
        """A sentence on the kills."""
        return (
            f"{self.killed} servers killed, {self.in_stream} of them between the first block and the end of a stream "
            f"({'; '.join(self._moments)}); {self.went_on} streams went on behind a block of another server."
        )

    def _started(self) -> ComfyUIServer:
        packs, models = {"StreamBlocks": streamblocks_path.ROOT}, {MODEL: self._model}
        return ComfyUIServer(self._base, packs, models, boot_timeout=_PATIENCE).__enter__()

    def _kill(self, index: int) -> None:
        self._server.kill()
        self.killed += 1
        folders = [path.parent for path in self._unfinished().glob("*/video.mp4")]
        # A folder without a snapshot may be of an earlier run.
        resumable = [folder for folder in folders if any(folder.glob("*.safetensors"))]
        self.in_stream += bool(resumable)
        made = max((_blocks_in(folder / "video.mp4") for folder in resumable), default=0)
        self._moments.append(f"run {index}: {made} blocks")
        self._server = self._started()

    def _await_moment(self, queued: str, began: float, seconds: float) -> None:
        """Wait until the server is to be killed, or the prompt has ended.

        Args:
            queued: the prompt.
            began: when it was queued, seconds since 1970.
            seconds: that a block takes.
        """
        if self._random.random() < _WHILE_LOADING:
            time.sleep(self._random.uniform(0.0, 2.0))
            return
        saved = self._blocks_saved()
        target = self._random.uniform(saved + 1, BLOCKS)
        while self._blocks_made(began) < int(target) and not self._server.get(f"/history/{queued}"):
            time.sleep(0.02)
        time.sleep(target % 1 * seconds)

    def _blocks_made(self, began: float) -> int:
        """Blocks in the file that has grown since `began`."""
        files = [*self._unfinished().glob("*/video.mp4"), *(self._base / "temp").glob("streamblocks*.mp4")]
        try:
            return max((_blocks_in(path) for path in files if path.stat().st_mtime > began), default=0)
        except FileNotFoundError:
            # Finished meanwhile.
            return BLOCKS

    def _blocks_saved(self) -> int:
        saved = [int(path.stem.removeprefix("block_")) for path in self._unfinished().glob("*/block_*.safetensors")]
        return max(saved, default=0)

    def _made_whole(self, scenario: tuple[str, bool]) -> tuple[list[str], float]:
        """Digests of the stream that is never stopped, made once, without saves; and the seconds of a block."""
        if scenario not in self._whole:
            name, began = f"whole_{scenario[0]}_{scenario[1]}", time.time()
            queued = self._server.queue(self._prompt(name, scenario, NEW, 0))
            while not self._blocks_made(began) and not self._server.get(f"/history/{queued}"):
                time.sleep(0.02)
            first = time.monotonic()
            entry = self._server.wait(queued, _PATIENCE)
            self._whole[scenario] = decoded_digests(self._file(entry)), (time.monotonic() - first) / BLOCKS
        return self._whole[scenario]

    def _prompt(self, name: str, scenario: tuple[str, bool], resume: str, save_every: int) -> dict[str, Any]:
        policy, video = scenario
        request = {
            "name": name, "policy": policy, "video": INPUT if video else "", "blocks": BLOCKS, "seed": SEED,
            "save_every": save_every, "resume": resume,
        }  # fmt: skip
        made = prompt_of(request, self._defaults)
        if video:
            made[VIDEO] = {"class_type": "LoadVideo", "inputs": {"file": INPUT}}
        made[SHOWN] = {"class_type": "PreviewAny", "inputs": {"source": ["3", 2]}}
        return made

    def _defaults(self, node: str) -> dict[str, Any]:
        return defaults_of(self._server.get(f"/object_info/{node}")[node]["input"]["required"])

    def _file(self, entry: dict[str, Any]) -> Path:
        (video,) = [path for path in self._server.output_files(entry) if path.suffix == ".mp4"]
        return video

    def _unfinished(self) -> Path:
        return self._base / "output/streamblocks/unfinished"


def _blocks_in(growing: Path) -> int:
    return growing.read_bytes().count(b"moof")
