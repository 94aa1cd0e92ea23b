"""How much the pack adds to ComfyUI's start: import, entry point, node list and schemas.

    python benchmarks/import_time.py [--comfyui PATH] [--python PYTHON] [--repeat 5] [--json]

Runs in real ComfyUI's Python ($COMFYUI_PATH, else ~/comfy/ComfyUI), after everything ComfyUI itself has imported
by the time it loads custom nodes; `python -X importtime` says which modules came in.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MARK = "streamblocks-import-begins"
PROGRAM = f"""
import asyncio, importlib.util, sys, time
sys.argv = ["main.py", "--cpu"]
sys.path.insert(0, {{comfyui!r}})
import comfy.options
comfy.options.enable_args_parsing()
import torch, execution, folder_paths, nodes, server
import comfy.model_management, comfy.model_patcher, comfy.utils
from comfy_api.latest import ComfyExtension, io
folder_paths.get_filename_list("diffusion_models")
print({MARK!r}, file=sys.stderr, flush=True)
began = time.perf_counter()
spec = importlib.util.spec_from_file_location(
    "pack", {str(ROOT / "__init__.py")!r}, submodule_search_locations=[{str(ROOT)!r}])
module = importlib.util.module_from_spec(spec)
sys.modules["pack"] = module
spec.loader.exec_module(module)
async def schemas():
    extension = await module.comfy_entrypoint()
    return [node.GET_SCHEMA().node_id for node in await extension.get_node_list()]
names = asyncio.run(schemas())
print("seconds", time.perf_counter() - began, len(names))
"""
_LINE = re.compile(r"import time:\s+(\d+) \|\s+(\d+) \| (\s*)(\S+)")


def measure_once(comfyui: Path, python: Path) -> tuple[float, list[tuple[float, str]]]:
    """Seconds of one start, and the modules that took over a millisecond of their own, with milliseconds."""
    command = [str(python), "-X", "importtime", "-c", PROGRAM.format(comfyui=str(comfyui))]
    done = subprocess.run(command, capture_output=True, text=True, cwd=comfyui, check=False)
    found = re.search(r"^seconds (\S+) (\d+)$", done.stdout, re.MULTILINE)
    if found is None:
        raise SystemExit(f"ComfyUI at {comfyui} did not start:\n{done.stderr[-2000:]}")
    lines = _LINE.findall(done.stderr.partition(MARK)[2])
    slow = sorted(((int(own) / 1000, name) for own, _, _, name in lines if int(own) > 1000), reverse=True)
    return float(found.group(1)), slow


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = Path(os.environ.get("COMFYUI_PATH", "~/comfy/ComfyUI")).expanduser()
    parser.add_argument("--comfyui", type=Path, default=default)
    parser.add_argument("--python", type=Path)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    own = options.comfyui / ".venv/bin/python"
    python = options.python or (own if own.is_file() else Path(sys.executable))
    runs = [measure_once(options.comfyui, python) for _ in range(options.repeat)]
    seconds = [run[0] for run in runs]
    result = {"median_seconds": round(statistics.median(seconds), 4), "max_seconds": round(max(seconds), 4)}
    if options.json:
        print(json.dumps(result))
        return
    print(f"{options.repeat} starts: median {result['median_seconds']} s, longest {result['max_seconds']} s")
    print("modules with over 1 ms of their own, last start:")
    for milliseconds, name in runs[-1][1]:
        print(f"{milliseconds:8.1f} ms  {name}")


if __name__ == "__main__":
    main()
