"""The memory benchmarks on the tiny model and the CPU: structure and bytes, no timing."""

import json

import pytest
import small_cards
from diffusers.utils import logging as diffusers_logging

import cleanup
import memory_table


@pytest.fixture
def diffusers_verbosity():
    """The table's program silences diffusers, which would last."""
    level = diffusers_logging.get_verbosity()
    yield
    diffusers_logging.set_verbosity(level)


def test_three_policies_side_by_side_and_the_cost_of_recording(capsys):
    sizes = ["--resolution", "32x32", "--blocks", "3", "--steps", "1"]
    cleanup.main(["--device", "cpu", "--size", "tiny", "--json", *sizes])
    report = json.loads(capsys.readouterr().out)
    assert [one["policy"] for one in report["policies"]] == ["when it pays", "every block", "never"]
    # The same stream: what it holds at once does not depend on when garbage is collected.
    assert len({one["peak"] for one in report["policies"]}) == 1
    assert [one["mode"] for one in report["timeline"]] == ["on", "exact"]
    assert all(one["own_ms"] > 0 for one in report["timeline"])


def test_the_table_adds_up(capsys, diffusers_verbosity):
    memory_table.main(["--sizes", "tiny", "--resolutions", "832x480", "--contexts", "6"])
    text = capsys.readouterr().out
    header, _, *lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()]
    rows = [dict(zip(header, line, strict=True)) for line in lines]
    assert [(row["context"], row["format"]) for row in rows] == [("6", "bf16"), ("6", "fp8"), ("6", "int8")]
    parts = ("transformer", "VAE", "KV cache", "cross cache", "decoder cache", "activations", "overhead")
    for row in rows:
        assert abs(sum(float(row[part]) for part in parts) - float(row["needed"])) < 0.05
        assert float(row["activations"]) > 0
    # 2 x 2 layers x 9 latent frames x 1,560 tokens x 64 x 2 bytes.
    assert float(rows[-1]["KV cache"]) == round(2 * 2 * 9 * 1560 * 64 * 2 / 2**30, 2)


def test_streams_on_small_cards_are_measured(capsys):
    """All layers of the tiny model streamed, beside everything resident."""
    small_cards.main(["--size", "tiny", "--device", "cpu", "--blocks", "4", "--json"])
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert told["pictures_equal"] is True and told["layers_streamed"] == 8
    resident, streamed = told["cases"]
    assert (resident["layers_streamed"], resident["copied_bytes"]) == (0, 0)
    # Through three slots; what stays is not in layers.
    layer = told["streamed_weight_bytes"] // 3
    assert told["resident_weight_bytes"] < resident["resident_weight_bytes"] - 7 * layer
    # Four passes a block, the context's with the first step, in each of which every layer is copied.
    assert streamed["copied_bytes"] == 4 * 8 * layer
