"""A refactoring changes no picture: digests of frames, kept from before the rooms were rebuilt."""

import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from frame_digest_program import SAME_EVERYWHERE

HERE = Path(__file__).resolve().parent
KEPT = json.loads((HERE / "data" / "frame_digests.json").read_text())


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the digests are of x86-64 code paths")
def test_frames_are_those_of_before(tmp_path):
    environment = os.environ | SAME_EVERYWHERE
    program = [sys.executable, str(HERE / "frame_digest_program.py"), str(tmp_path)]
    done = subprocess.run(program, env=environment, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    made = json.loads(done.stdout.splitlines()[-1])
    if made["torch"] != KEPT["torch"]:
        pytest.skip(f"the digests are of torch {KEPT['torch']}, this is {made['torch']}, which may round otherwise")
    assert made["digests"] == KEPT["digests"]
