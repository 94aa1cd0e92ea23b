"""A real ComfyUI on a free loopback port, with this pack in its `custom_nodes`, for tests.

    with ComfyUIServer(tmp_path, packs={"my-stream.pack.v2": PACK_ROOT}) as server:
        entry = server.run(prompt)          # API format
        files = server.output_files(entry)

Standard library only: ComfyUI has its own interpreter and environment, and this file runs in ours.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import IO, Any

BOOT_TIMEOUT = 120.0
LOG_TAIL_LINES = 60

# Turns off what a first visit shows over the graph: template browser, release notes, survey and so on.
QUIET_SETTINGS: dict[str, object] = {
    "Comfy.TutorialCompleted": True,
    "Comfy.InstalledVersion": "1.49.6",
    "Comfy.Notification.ShowVersionUpdates": False,
    "Comfy.VersionCompatibility.DisableWarnings": True,
    "Comfy.Workflow.Persist": False,
    "Comfy.Workflow.AutoSave": "off",
    # It lies over the corner of the canvas, and takes the clicks that are meant for a node there.
    "Comfy.Minimap.Visible": False,
}

# No proxy, whatever the environment says: the server is on this machine.
_opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))


class ComfyUIError(RuntimeError):
    """ComfyUI did not start, refused a prompt, or failed while running it."""


def comfyui_path() -> Path:
    """Where ComfyUI is looked for: `$COMFYUI_PATH`, else `~/comfy/ComfyUI`."""
    return Path(os.environ.get("COMFYUI_PATH") or Path.home() / "comfy" / "ComfyUI").expanduser()


def comfyui_python(path: Path) -> Path:
    """The interpreter for the ComfyUI at `path`: `$COMFYUI_PYTHON`, else its `.venv`, else this one."""
    if os.environ.get("COMFYUI_PYTHON"):
        return Path(os.environ["COMFYUI_PYTHON"]).expanduser()
    own = path / ".venv" / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    return own if own.exists() else Path(sys.executable)


def comfyui_found() -> bool:
    """True if there is a ComfyUI to start."""
    return (comfyui_path() / "main.py").is_file()


def free_port() -> int:
    """A TCP port that is currently free."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass
class ComfyUIServer:
    """A ComfyUI process; a context manager that always ends it.

    `packs` maps a folder name under `custom_nodes` to the folder it links to; `models` maps a path under
    `models/` (such as `diffusers/tiny`) to the file or folder it links to. Both are placed before boot.
    """

    base: Path
    packs: Mapping[str, Path] = field(default_factory=dict)
    models: Mapping[str, Path] = field(default_factory=dict)
    settings: Mapping[str, object] = field(default_factory=dict)
    extra_args: Sequence[str] = ()
    port: int = field(default_factory=free_port)
    boot_timeout: float = BOOT_TIMEOUT
    _process: subprocess.Popen[bytes] | None = field(default=None, init=False)
    _log: IO[bytes] | None = field(default=None, init=False)

    @property
    def url(self) -> str:
        """The address of the page, without a trailing slash."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def log_path(self) -> Path:
        """The file that receives everything ComfyUI prints."""
        return self.base / "comfyui.log"

    def __enter__(self) -> ComfyUIServer:
        self._lay_out()
        self._start()
        try:
            self._wait_until_up()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _lay_out(self) -> None:
        for folder in ("custom_nodes", "models", "input", "output", "temp", "user/default"):
            (self.base / folder).mkdir(parents=True, exist_ok=True)
        for name, source in self.packs.items():
            _link(self.base / "custom_nodes" / name, source)
        for name, source in self.models.items():
            _link(self.base / "models" / name, source)
        settings = {**QUIET_SETTINGS, **self.settings}
        (self.base / "user/default/comfy.settings.json").write_text(json.dumps(settings))

    def _start(self) -> None:
        path = comfyui_path()
        # API nodes off also keeps the page from calling the makers' servers.
        command = [str(comfyui_python(path)), str(path / "main.py"), "--cpu", "--listen", "127.0.0.1"]
        command += ["--port", str(self.port), "--base-directory", str(self.base.resolve())]
        command += ["--disable-auto-launch", "--disable-api-nodes", "--database-url", "sqlite:///:memory:"]
        environment = {**os.environ, "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1"}
        self._log = self.log_path.open("wb")
        self._process = subprocess.Popen(
            [*command, *self.extra_args],
            cwd=path,
            env=environment,
            stdout=self._log,
            stderr=subprocess.STDOUT,
        )

    def _wait_until_up(self) -> None:
        deadline = time.monotonic() + self.boot_timeout
        while time.monotonic() < deadline:
            self._raise_if_dead()
            try:
                self.get("/system_stats")
            except (OSError, ValueError):
                time.sleep(0.25)
            else:
                return
        raise ComfyUIError(f"ComfyUI did not answer within {self.boot_timeout:.0f} s.\n{self.log_tail()}")

    def _raise_if_dead(self) -> None:
        if self._process is None or self._process.poll() is not None:
            code = self._process.returncode if self._process else None
            raise ComfyUIError(f"ComfyUI is not running (exit code {code}).\n{self.log_tail()}")

    def stop(self) -> None:
        """End the process and wait for it."""
        if self._process is not None:
            self._process.terminate()
            try:
                self._process.wait(15)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
            self._process = None
        if self._log is not None:
            self._log.close()
            self._log = None

    def kill(self) -> None:
        """End the process as a crash does, and wait for it."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        self.stop()

    def log_text(self) -> str:
        """Everything ComfyUI has printed so far."""
        return self.log_path.read_text(errors="replace") if self.log_path.exists() else ""

    def log_tail(self, lines: int = LOG_TAIL_LINES) -> str:
        """The last lines ComfyUI printed."""
        return "\n".join(self.log_text().splitlines()[-lines:])

    def get(self, path: str) -> Any:
        """The JSON answer to a GET."""
        with _opener.open(self.url + path, timeout=10) as answer:
            return json.load(answer)

    def post(self, path: str, body: Mapping[str, object] | str) -> Any:
        """The JSON answer to a POST of JSON; None where there is no body."""
        request = urllib.request.Request(
            self.url + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        try:
            with _opener.open(request, timeout=30) as answer:
                text = answer.read()
        except urllib.error.HTTPError as error:
            raise ComfyUIError(f"POST {path}: {error.code}: {error.read().decode(errors='replace')}") from error
        return json.loads(text) if text else None

    def object_info(self) -> dict[str, Any]:
        """The schemas of all nodes, by class."""
        return dict(self.get("/object_info"))

    def queue(self, prompt: Mapping[str, object], workflow: Mapping[str, object] | None = None) -> str:
        """Queue an API-format prompt, with the UI-format workflow it came from if any; return its id."""
        extra = {"extra_pnginfo": {"workflow": workflow}} if workflow is not None else {}
        answer = self.post("/prompt", {"prompt": prompt, "client_id": "tests", "extra_data": extra})
        if answer.get("node_errors"):
            raise ComfyUIError(f"ComfyUI refused nodes: {json.dumps(answer['node_errors'], indent=1)}")
        return str(answer["prompt_id"])

    def wait(self, prompt_id: str, timeout: float = 300.0) -> dict[str, Any]:
        """The history entry of a finished prompt; raises with the node's own error if it failed."""
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            self._raise_if_dead()
            entry = self.get(f"/history/{prompt_id}").get(prompt_id)
            if entry is not None:
                return _checked(entry)
            time.sleep(0.1)
        raise ComfyUIError(f"prompt {prompt_id} did not finish within {timeout:.0f} s.\n{self.log_tail()}")

    def run(
        self,
        prompt: Mapping[str, object],
        workflow: Mapping[str, object] | None = None,
        timeout: float = 300.0,
    ) -> dict[str, Any]:
        """Queue a prompt and wait for it."""
        return self.wait(self.queue(prompt, workflow), timeout)

    def interrupt(self) -> None:
        """Cancel the running prompt."""
        self.post("/interrupt", {})

    def queue_sizes(self) -> tuple[int, int]:
        """How many prompts are running and how many wait."""
        queue = self.get("/queue")
        return len(queue["queue_running"]), len(queue["queue_pending"])

    def output_files(self, entry: Mapping[str, Any]) -> list[Path]:
        """The files a history entry names, in the order of its nodes."""
        found = []
        for outputs in entry["outputs"].values():
            for items in outputs.values():
                for item in items if isinstance(items, list) else ():
                    if isinstance(item, dict) and "filename" in item:
                        folder = self.base / item.get("type", "output") / item.get("subfolder", "")
                        found.append(folder / item["filename"])
        return found


def _link(link: Path, source: Path) -> None:
    link.parent.mkdir(parents=True, exist_ok=True)
    # Another server's, before it ended.
    link.unlink(missing_ok=True)
    link.symlink_to(source.resolve(), target_is_directory=source.is_dir())


def _checked(entry: dict[str, Any]) -> dict[str, Any]:
    """The entry itself if the prompt succeeded, else an error with what the failing node said."""
    status = entry.get("status") or {}
    if status.get("status_str") == "success":
        return entry
    for name, data in status.get("messages", ()):
        if name == "execution_error":
            where = f"{data.get('node_type')} (node {data.get('node_id')})"
            trace = "".join(data.get("traceback") or ())
            message = f"{data.get('exception_type')}: {data.get('exception_message')}"
            raise ComfyUIError(f"{where}: {message}\n{trace}")
        if name == "execution_interrupted":
            raise ComfyUIError(f"interrupted at {data.get('node_type')} (node {data.get('node_id')})")
    raise ComfyUIError(f"the prompt did not succeed: {json.dumps(status)}")
