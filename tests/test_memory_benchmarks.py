"""The memory benchmarks on the tiny model and the CPU: structure and bytes, no timing."""

import json
import os
import subprocess
import sys
from pathlib import Path

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"


def run(script, *arguments):
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / script), *arguments],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_three_policies_side_by_side_and_the_cost_of_recording():
    sizes = ["--resolution", "32x32", "--blocks", "3", "--steps", "1"]
    report = json.loads(run("cleanup.py", "--device", "cpu", "--size", "tiny", "--json", *sizes))
    assert [one["policy"] for one in report["policies"]] == ["when it pays", "every block", "never"]
    # The same stream: what it holds at once does not depend on when garbage is collected.
    assert len({one["peak"] for one in report["policies"]}) == 1
    assert [one["mode"] for one in report["timeline"]] == ["on", "exact"]
    assert all(one["own_ms"] > 0 for one in report["timeline"])


def test_the_table_adds_up():
    text = run("memory_table.py", "--sizes", "tiny", "--resolutions", "832x480", "--contexts", "6")
    header, _, *lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()]
    rows = [dict(zip(header, line, strict=True)) for line in lines]
    assert [(row["context"], row["format"]) for row in rows] == [("6", "bf16"), ("6", "fp8"), ("6", "int8")]
    parts = ("transformer", "VAE", "KV cache", "cross cache", "decoder cache", "activations", "overhead")
    for row in rows:
        assert abs(sum(float(row[part]) for part in parts) - float(row["needed"])) < 0.05
        assert float(row["activations"]) > 0
    # 2 x 2 layers x 9 latent frames x 1,560 tokens x 64 x 2 bytes.
    assert float(rows[-1]["KV cache"]) == round(2 * 2 * 9 * 1560 * 64 * 2 / 2**30, 2)
