"""Hub repositories: what is downloaded, when, and how it is stopped; against a hub of our own on this machine.

One program plays all scenes, one after another, because the hub's address is read when its library is imported.
"""

import json
import os
import subprocess
import sys
import threading

import pytest

from streamblocks.stream.abandoned_work import Abandoned
from streamblocks.stream.hub_download import FileProgress

from fake_hub import fake_hub

PROGRAM = """
import json, os, sys, urllib.request
import huggingface_hub.constants
from pathlib import Path
from streamblocks.stream import hub
from streamblocks.stream.materialise import materialise, release_materialised
from streamblocks.stream.recipe import Recipe
from streamblocks.stream.residency import PlainResidency

class Card(PlainResidency):
    def __init__(self, size):
        super().__init__()
        self.size = size

    def available_bytes(self, device):
        return self.size

class Cancelled(BaseException):
    pass

facts = {}

def play(scene, size=10**12, cancel_at=None, **recipe):
    urllib.request.urlopen(os.environ["HF_ENDPOINT"] + "/mark/" + scene)
    seen = []
    def on_load(what, done, total):
        seen.append((what, done, total))
        if cancel_at is not None and done >= cancel_at:
            raise Cancelled()
    release_materialised()
    try:
        made = type(materialise(Recipe("owner/model", **recipe), residency=Card(size), on_load=on_load)).__name__
    except BaseException as error:
        made = f"{type(error).__name__}: {error}"
    facts[scene] = {"made": made, "seen": seen}

play("too_large", size=1000)
play("cancelled", cancel_at=1, components=sys.argv[1])
play("transformer_only", components=sys.argv[1])
play("whole")
urllib_open, address = urllib.request.urlopen, huggingface_hub.constants.ENDPOINT
urllib.request.urlopen = lambda url: None
# A port at which nobody listens.
huggingface_hub.constants.ENDPOINT = "http://127.0.0.1:9"
play("offline")
play("offline_unknown", revision="other")
huggingface_hub.constants.ENDPOINT, urllib.request.urlopen = address, urllib_open
try:
    hub.find_repository("owner/model", None, ("unet",))
except Exception as error:
    facts["unet"] = {"made": f"{type(error).__name__}: {error}", "seen": []}
print("FACTS " + json.dumps(facts))
"""


@pytest.fixture(scope="module")
def scenes(tiny_folder, tmp_path_factory):
    """Per scene: what came of it, what the loading said, and what the hub was asked for."""
    with fake_hub("owner/model", tiny_folder) as (address, asked):
        environment = os.environ | {
            "HF_ENDPOINT": address,
            "HF_HOME": str(tmp_path_factory.mktemp("hub")),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
        }
        for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
            environment.pop(name, None)
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM, str(tiny_folder)],
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
        )
    facts = [line for line in done.stdout.splitlines() if line.startswith("FACTS ")]
    assert facts, done.stdout[-2000:] + done.stderr[-4000:]
    scenes = json.loads(facts[-1].removeprefix("FACTS "))
    for scene in scenes.values():
        scene["asked"] = []
    scene = None
    for line in asked:
        if line.startswith("MARK "):
            scene = line.removeprefix("MARK ")
        else:
            scenes[scene]["asked"].append(line)
    return scenes


def downloaded(scene):
    """Folders of the files that were fetched whole."""
    whole = [line.removeprefix("GET ") for line in scene["asked"] if line.startswith("GET ")]
    return {name.partition("/")[0] for name in whole if not name.startswith("part of ")}


def test_what_cannot_fit_is_not_downloaded(scenes):
    scene = scenes["too_large"]
    assert scene["made"].startswith("MemoryError: the transformer of 'owner/model' alone needs")
    assert all(done == total == 0 for _, done, total in scene["seen"]) and downloaded(scene) == set()
    # Only the header was looked at.
    assert scene["asked"] and all(line.startswith("GET part of transformer/") for line in scene["asked"])


def test_cancel_stops_the_download(scenes):
    scene = scenes["cancelled"]
    assert scene["made"] == "Cancelled: "
    assert len([line for line in scene["asked"] if line.startswith("GET ") and "part of" not in line]) == 1


def test_with_components_from_elsewhere_only_the_transformer_comes(scenes):
    scene = scenes["transformer_only"]
    assert scene["made"] == "BuiltInPipeline"
    assert downloaded(scene) == {"transformer"}
    # The end of each file at the least, never backwards, up to all of it.
    done = [count for _, count, _ in scene["seen"]]
    assert done == sorted(done) and done[-1] == scene["seen"][-1][2] > 0


def test_the_whole_pipeline_comes_and_is_found_again_without_a_network(scenes):
    assert scenes["whole"]["made"] == scenes["offline"]["made"] == "BuiltInPipeline"
    # The transformer is there already.
    assert downloaded(scenes["whole"]) == {"vae", "text_encoder", "tokenizer"}
    assert downloaded(scenes["offline"]) == set()
    assert scenes["offline_unknown"]["made"].startswith("CheckpointError: hub repository 'owner/model' could not be")


def test_a_transfer_that_was_stopped_is_told_so_in_its_own_thread():
    """As the hub's Xet transfer calls: from a thread of its own, by two bars."""
    progress = FileProgress()
    bars = [progress.bar_class()(total=100) for _ in range(2)]
    ended = []

    def transfer():
        for _ in range(4):
            for bar in bars:
                try:
                    bar.update(10)
                except Abandoned:
                    ended.append(progress.count)
            if progress.count == 30:
                progress.stop()

    thread = threading.Thread(target=transfer)
    thread.start()
    thread.join()
    assert ended == [30, 30] and progress.count == 30


def test_a_repository_without_the_components_is_named(scenes):
    assert "has no files in unet" in scenes["unet"]["made"]
