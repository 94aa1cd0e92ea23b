"""Hub repositories: what is downloaded, when, and how it is stopped; against a local hub."""

import json
import os
import subprocess
import sys

import pytest

from fake_hub import fake_hub

PRELUDE = """
import json, sys
from streamblocks.stream.materialise import materialise
from streamblocks.stream.recipe import Recipe
from streamblocks.stream.residency import PlainResidency
class Card(PlainResidency):
    def __init__(self, size):
        super().__init__()
        self.size = size
    def available_bytes(self, device):
        return self.size
seen = []
class Cancelled(BaseException):
    pass
def run(size=10**12, cancel_at=None, **recipe):
    def on_load(what, done, total):
        seen.append((what, done, total))
        if cancel_at is not None and done >= cancel_at:
            raise Cancelled()
    try:
        pipeline = materialise(Recipe("owner/model", **recipe), residency=Card(size), on_load=on_load)
    except BaseException as error:
        return f"{type(error).__name__}: {error}"
    return type(pipeline).__name__
def report(**facts):
    print("FACTS " + json.dumps(facts))
"""


@pytest.fixture
def hub(tiny_folder, tmp_path):
    """Runs a program against a hub that has the tiny model as owner/model; gives its facts, and what was asked for."""

    def run(program):
        with fake_hub("owner/model", tiny_folder) as (address, asked):
            environment = os.environ | {
                "HF_ENDPOINT": address,
                "HF_HOME": str(tmp_path / "hf"),
                "HF_HUB_DISABLE_XET": "1",
                "HF_HUB_DISABLE_TELEMETRY": "1",
            }
            for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
                environment.pop(name, None)
            done = subprocess.run(
                [sys.executable, "-c", PRELUDE + program, str(tiny_folder)],
                env=environment,
                capture_output=True,
                text=True,
                timeout=200,
            )
        facts = [line for line in done.stdout.splitlines() if line.startswith("FACTS ")]
        assert facts, done.stdout[-2000:] + done.stderr[-4000:]
        return json.loads(facts[-1].removeprefix("FACTS ")), asked

    return run


def downloaded(asked):
    whole = [line.removeprefix("GET ") for line in asked if line.startswith("GET ")]
    return {name.partition("/")[0] for name in whole if not name.startswith("part of ")}


def test_with_components_from_elsewhere_only_the_transformer_comes(hub):
    facts, asked = hub("report(made=run(components=sys.argv[1]), seen=seen)")
    assert facts["made"] == "BuiltInPipeline"
    assert downloaded(asked) == {"transformer"}
    # The end of each file at the least, never backwards, up to all of it.
    done = [count for _, count, _ in facts["seen"]]
    assert done == sorted(done) and done[-1] == facts["seen"][-1][2] > 0


def test_the_whole_pipeline_comes_and_is_found_again_without_a_network(hub):
    facts, asked = hub(
        """
first = run()
import huggingface_hub.constants, streamblocks.stream.hub as hub
from streamblocks.stream.materialise import release_materialised
release_materialised()
def no_network(*_, **__):
    raise OSError("no network")
hub.HfApi.model_info = no_network
report(made=first, again=run())
"""
    )
    assert facts == {"made": "BuiltInPipeline", "again": "BuiltInPipeline"}
    assert downloaded(asked) == {"transformer", "vae", "text_encoder", "tokenizer"}


def test_what_cannot_fit_is_not_downloaded(hub):
    facts, asked = hub("report(said=run(size=1000), seen=seen)")
    assert facts["said"].startswith("MemoryError: the transformer of 'owner/model' alone needs")
    assert facts["seen"] == [] and downloaded(asked) == set()
    # Only the header was looked at.
    assert all(line.startswith("GET part of transformer/") for line in asked)


def test_cancel_stops_the_download(hub):
    facts, asked = hub("report(said=run(cancel_at=1))")
    assert facts["said"] == "Cancelled: "
    assert len([line for line in asked if line.startswith("GET ") and "part of" not in line]) == 1


def test_a_repository_without_the_components_is_named(hub):
    facts, _ = hub(
        """
from streamblocks.stream.hub import find_repository
try:
    find_repository("owner/model", None, ("unet",))
except Exception as error:
    said = f"{type(error).__name__}: {error}"
report(said=said, absent=run.__globals__["materialise"] is not None)
"""
    )
    assert "has no files in unet" in facts["said"]
