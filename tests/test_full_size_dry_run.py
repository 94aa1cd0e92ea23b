"""The full-size benchmark on the tiny model and the CPU: structure and bookkeeping, no timing."""

from __future__ import annotations

import json
from contextlib import redirect_stdout
from io import StringIO

import pytest
from full_size_options import parse_options
from stream_variants import Variant, read_window, variants_of

import full_size

BLOCKS = 5
STEPS = 2


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """What the program writes for two formats, both policies and one size that cannot work."""
    folder = tmp_path_factory.mktemp("full_size")
    target = folder / "figures.json"
    command = ["--size", "tiny", "--device", "cpu", "--formats", "bf16,fp8"]
    command += ["--resolutions", "32x32,40x32", "--policies", "recompute,rolling", "--plain", "--plain-blocks", "3"]
    command += ["--blocks", str(BLOCKS), "--steps", str(STEPS), "--text-encoder", "--json", str(target)]
    with redirect_stdout(StringIO()) as printed:
        full_size.main(command)
    return json.loads(target.read_text()) | {"printed": printed.getvalue()}


def figures(report, **wanted):
    return [
        one
        for one in report["configurations"]
        if "error" not in one and all(one[key] == value for key, value in wanted.items())
    ]


def test_every_configuration_is_there_and_a_failing_one_says_why(report):
    assert len(figures(report)) == 4
    failed = [one for one in report["configurations"] if "error" in one]
    assert [one["resolution"] for one in failed] == ["40x32"] * 4
    assert all("multiple of 16" in one["error"] for one in failed)
    assert failed[0]["error"] in report["printed"]


def test_a_stream_has_all_its_pictures_and_no_growth(report):
    for one in figures(report):
        assert [block["pictures"] for block in one["per_block"]] == [9] + [12] * (BLOCKS - 1)
        assert one["growth_bytes"] == [0] * (BLOCKS - 3)
        assert one["recompiles_after_block_2"] == 0


def test_stages_follow_the_policy_and_add_up_to_the_block(report):
    steps = {f"step {number}" for number in range(STEPS)}
    for policy, extra in (("recompute", {"context", "encode"}), ("rolling", set())):
        for one in figures(report, policy=policy):
            assert set(one["stages_ms"]) == steps | extra | {"remember", "decode", "rest"}
            for block in one["per_block"]:
                assert sum(block["stages"].values()) == pytest.approx(1000 * block["seconds"])


def test_each_stage_of_work_has_a_positive_floor(report):
    for policy, extra in (("recompute", {"context", "encode"}), ("rolling", {"remember"})):
        for one in figures(report, policy=policy):
            assert set(one["floors_ms"]) == {"step 0", "step 1", "decode"} | extra
            assert all(floor["ideal"] > 0 for floor in one["floors_ms"].values())
            assert all(floor["kernels"] > 0 for floor in one["floors_ms"].values())


def test_work_is_counted_from_the_shapes(report):
    work = report["work"]["tiny 32x32 recompute"]
    tokens, dim, wide, layers, text = 3 * 4, 64, 128, 2, 512
    assert work["step 0"]["attention"] == layers * 4 * tokens * dim * (2 * tokens + text)
    blocks = layers * 2 * tokens * (6 * dim * dim + 2 * dim * wide)
    assert work["step 0"]["linear"] - blocks < 0.5 * blocks  # time embedding and head on top
    assert work["step 0"]["linear"] > blocks
    assert work["decode"]["convolution"] > 0


def test_fp8_weights_are_smaller(report):
    wide, narrow = (figures(report, format=name, policy="rolling")[0]["allocated"] for name in ("bf16", "fp8"))
    assert narrow < wide


def test_the_plain_loop_copies_and_grows_beside_ours(report):
    for one in figures(report):
        assert min(one["plain"]["copied_bytes_per_call"][1:]) > 0


def test_rates_are_measured_before_anything_else(report):
    rates = report["rates"]["tiny"]
    assert rates["matrix"]["bf16"] > 0
    assert rates["copy"] > 0
    assert rates["attention"]["native 12x24"] > 0


def test_variants_are_those_that_exist_for_a_policy_and_a_backend():
    options = parse_options("", ["--windows", "6,12s3", "--fuse", "both", "--wide-keys", "both", "--graphs", "on"])
    assert list(variants_of(options, "recompute", "native")) == [
        Variant(graphs=True),
        Variant(fused=True, graphs=True),
    ]
    described = [variant.describe() for variant in variants_of(options, "rolling", "flash3_fp8")]
    assert len(described) == 8 and described[-1] == "w12s3+fused+wide-keys+graphs"
    assert list(variants_of(parse_options("", []), "rolling", "flash3_fp8")) == [Variant()]
    assert Variant().describe() == "-"


def test_windows_include_the_block():
    settings = Variant(window="21").settings()
    assert settings == {"context_frames": 18, "sink_frames": 0, "fuse_context": False}
    assert read_window("12s3") == (9, 3)
    for wrong in ("3", "12s10", "s3", "twelve"):
        with pytest.raises(ValueError, match=f"'{wrong}' is no window"):
            read_window(wrong)
