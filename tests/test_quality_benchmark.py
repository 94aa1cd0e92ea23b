"""`benchmarks/quality.py`: every figure it promises is there, and in its range."""

from __future__ import annotations

import json

import pytest
import quality_direct
from PIL import Image

import quality

TRACK = ("track_accuracy", "track_accuracy_one_block_later", "seam_ratio_transition")
PICTURES = ("start_image_accuracy", "video_color_accuracy", "video_motion_accuracy")
FEW = {
    "captions": 2,
    "long-captions": 1,
    "blocks": 6,
    "change-captions": 1,
    "format-captions": 1,
    "decoder-captions": 1,
    "workers": 1,
}


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


@pytest.mark.usefixtures("no_pipeline")
def test_directed_streams_as_one_object(capsys, monkeypatch):
    # Shorter than those that are measured: one block before a change, one block of each video.
    monkeypatch.setattr("directed_streams._CHANGED_AT", 1)
    monkeypatch.setattr("pictured_streams.BLOCKS", 1)
    monkeypatch.setattr("pictured_streams.PICTURES", 9)
    monkeypatch.setattr("streamblocks.wan.rehearsal.rehearse_streaming_bytes", lambda *_: 0)
    monkeypatch.setattr(quality_direct, "CASES", {"recompute": quality_direct.CASES["recompute"]})
    few = ["--direct-cases=1", "--transition-cases=1", "--continue-blocks=2", "--workers=1", "--policies=recompute"]
    quality.main(["--direct", "--json", *few])
    printed = capsys.readouterr()
    (line,) = printed.out.splitlines()
    figures = json.loads(line)
    promised = {name: type(figures[name]) for name in (*TRACK, *PICTURES, "continue_equal")}
    assert promised == dict.fromkeys((*TRACK, *PICTURES), float) | {"continue_equal": bool}
    assert figures["continue_equal"] and figures["continue_equal_by_case"] == {"recompute": True}
    assert all(0.0 <= figures[name] <= 1.0 for name in ("track_accuracy", *PICTURES))
    assert figures["seam_ratio_transition"] > 0.0
    assert set(figures["by_choice"]) == {"recompute", "recompute, cut"}
    # The tables go beside it, and no other part runs.
    assert "transition's x" in printed.err and "formats" not in printed.err


def test_the_figures_in_front_are_those_of_the_samplers_policy(monkeypatch, capsys):
    tracks = {"recompute": 0.75, "rolling, keep keys": 0.25, "rolling, recompute keys": 0.5}
    shown = {"recompute": 0.75, "rolling": 0.25}

    def measure_track(choice, cases, *, cut=False, **_):
        return dict.fromkeys(("seam_ratio_change", *TRACK[:2]), 0.0 if cut else tracks[choice])

    def measure_pictured_streams(model, *, policy, **_):
        return dict.fromkeys((*PICTURES, "video_identity_psnr_db", "vae_psnr_db"), shown[policy])

    def measure_transition(choice, cases, **_):
        return {"seam_ratio_transition": tracks[choice], "transition_arrived": 1.0}

    equal = {"recompute": True, "rolling": False}
    monkeypatch.setattr(quality_direct, "measure_track", measure_track)
    monkeypatch.setattr(quality_direct, "measure_transition", measure_transition)
    monkeypatch.setattr(quality_direct, "measure_pictured_streams", measure_pictured_streams)
    monkeypatch.setattr(quality_direct, "continue_equal", lambda model, **_: equal)
    quality.main(["--direct", "--json"])
    figures = json.loads(capsys.readouterr().out)
    assert [figures[name] for name in (*TRACK, *PICTURES)] == [0.75] * 6
    assert figures["continue_equal"] is False and figures["continue_equal_by_case"] == equal
    assert {choice: found["track_accuracy"] for choice, found in figures["by_choice"].items()} == {
        **tracks, "recompute, cut": 0.0
    }  # fmt: skip
    assert set(figures["pictures_by_policy"]) == set(shown)


def test_a_wrong_name_is_named(capsys):
    with pytest.raises(SystemExit, match="2"):
        quality.main(["--only", "prompts,colors"])
    assert "--only has 'colors': choose from prompts, long, changes, formats, decoder." in capsys.readouterr().err
