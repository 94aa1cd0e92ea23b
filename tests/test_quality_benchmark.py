"""`benchmarks/quality.py`: every figure it promises is there, and in its range."""

from __future__ import annotations

import json

import pytest
from PIL import Image

import quality

FEW = {"captions": 2, "long-captions": 1, "blocks": 6, "change-captions": 1, "format-captions": 1, "workers": 1}


@pytest.mark.usefixtures("no_pipeline")
def test_all_parts_on_few_streams(tmp_path):
    target, sheets = tmp_path / "figures.json", tmp_path / "sheets"
    few = [f"--{name}={count}" for name, count in FEW.items()]
    quality.main([*few, "--formats", "bf16,fp8", "--json", str(target), "--sheets", str(sheets)])
    figures = json.loads(target.read_text())
    shares = [figures[f"{aspect}_accuracy"] for aspect in ("color", "shape", "direction")]
    shares += [figures["late_color_accuracy"][policy] for policy in ("recompute", "rolling")]
    shares += [figures["accuracy"][name] for name in ("bf16", "fp8")]
    assert all(0.0 <= share <= 1.0 for share in shares)
    assert figures["seam_ratio"] == figures["seam_ratio_by_policy"]["recompute"] > 0.0
    assert 1 <= figures["blocks_to_new_color"] <= 4
    # Rounded weights give almost the same pictures, not the same.
    assert figures["psnr_db"]["bf16"] is None and 10.0 < figures["psnr_db"]["fp8"] < 100.0
    # Of one clip.
    assert figures["median_psnr_db"] == figures["psnr_db"]
    # Which of the two is nearer to BF16 differs by machine where there is one clip.
    assert 10.0 < figures["psnr_db"]["float32"] < 100.0
    names = ("prompts", "long_recompute", "long_rolling", "changes", "format_bf16", "format_fp8")
    for name in names:
        with Image.open(sheets / f"{name}.png") as sheet:
            assert sheet.width >= 16 * 64


def test_a_wrong_name_is_named(capsys):
    with pytest.raises(SystemExit, match="2"):
        quality.main(["--only", "prompts,colors"])
    assert "--only has 'colors': choose from prompts, long, changes, formats." in capsys.readouterr().err
