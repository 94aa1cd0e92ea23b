"""A stream steered from real ComfyUI's page: watched, edited, paused, stopped and kept, and made again from its track.

Skipped where ComfyUI (`$COMFYUI_PATH`), Chromium or playwright are missing.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any
from uuid import uuid4

import av
import numpy as np
import pytest

from chromium_page import ComfyPage, why_no_chromium
from comfyui_server import ComfyUIServer

ROOT = Path(__file__).resolve().parent.parent
WORKFLOW = ROOT / "example_workflows/text_to_video_stream.json"
SCREENSHOTS = ROOT / "output/screenshots"
SET_RENDERER = "vue => app.extensionManager.setting.set('Comfy.VueNodes.Enabled', vue)"
SET_WIDGETS = """values => {
  const node = app.graph.nodes.find(n => n.type === 'StreamBlocksSampler')
  for (const [name, value] of Object.entries(values)) node.widgets.find(w => w.name === name).value = value
}"""
PICTURE = "() => document.querySelector('.streamblocks-pictures')?.toDataURL() ?? ''"
LINE = "() => document.querySelector('.streamblocks-progress')?.textContent ?? ''"
QUEUE = "() => { app.queuePrompt(0, 1) }"


def wait_for(page: ComfyPage, what: str, expression: str, argument: object = None, seconds: float = 90.0) -> None:
    """Until a JavaScript function in the page gives something true."""
    deadline = time.monotonic() + seconds
    while not page.evaluate(expression, argument):
        assert time.monotonic() < deadline, f"{what}; the player says {page.evaluate(LINE)!r}"
        page.page.wait_for_timeout(50)


def wait_for_block(page: ComfyPage, block: int) -> None:
    """Until the player says that a block (from 1) or a later one is made."""
    expression = f"block => Number((({LINE})().match(/block (\\d+)/) ?? [])[1] ?? 0) >= block"
    wait_for(page, f"no block {block}", expression, block)


def wait_until_idle(server: ComfyUIServer) -> None:
    deadline = time.monotonic() + 120
    while server.queue_sizes() != (0, 0):
        assert time.monotonic() < deadline, f"the queue is not done: {server.queue_sizes()}\n{server.log_tail()}"
        time.sleep(0.1)


def newest_run(server: ComfyUIServer) -> dict[str, Any]:
    """The history entry of the prompt that ended last."""
    entry: dict[str, Any] = list(server.get("/history?max_items=1").values())[-1]
    assert entry["status"]["status_str"] == "success", json.dumps(entry["status"])
    return entry


def pictures_of(path: Path) -> np.ndarray[Any, Any]:
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


@pytest.mark.parametrize("is_vue", [False, True], ids=["classic", "Vue"])
def test_what_was_steered_is_kept_and_made_again_to_the_bit(is_vue: bool, comfyui_server: ComfyUIServer) -> None:
    reason = why_no_chromium()
    if reason is not None:
        pytest.skip(reason)
    with ComfyPage(comfyui_server.url, height=1300) as opened:
        page = opened.page
        opened.evaluate(SET_RENDERER, is_vue)
        # With an id of its own: streams of other tests have the other one.
        opened.load_workflow(json.loads(WORKFLOW.read_text()) | {"id": str(uuid4())})
        values = {
            "endless": True,
            "width": 64,
            "height": 64,
            "steps": 1,
            "seed": 31,
            "prompt": "a red circle moves right",
        }
        opened.evaluate(SET_WIDGETS, values)
        opened.fit()

        def click(name: str) -> None:
            page.locator(f".streamblocks-{name}").click()

        opened.evaluate(QUEUE)
        # Pictures of the first block move before the second one behind it is made.
        wait_for_block(opened, 2)
        wait_for(opened, "nothing is drawn", f"() => ({PICTURE})().length > 3000")
        first = opened.evaluate(PICTURE)
        wait_for(opened, "nothing moves", f"first => ({PICTURE})() !== first", first)
        opened.evaluate(SET_WIDGETS, {"prompt": "a blue square moves up"})
        wait_for(opened, "no edit is offered", "() => document.querySelector('.streamblocks-apply')?.offsetParent")
        click("apply")
        wait_for(
            opened, "not applied", "() => document.querySelector('.streamblocks-prompt').textContent.includes('blue')"
        )
        click("pause")
        wait_for(opened, "no pause", f"() => ({LINE})().includes('paused before')")
        paused = opened.evaluate(LINE)
        page.wait_for_timeout(1000)
        assert opened.evaluate(LINE) == paused
        opened.screenshot(SCREENSHOTS / f"paused_{'Vue' if is_vue else 'classic'}_nodes.png")
        click("resume")
        wait_for(opened, "it does not go on", f"paused => ({LINE})() !== paused", paused)
        click("stop")
        wait_for(opened, "nothing stops", f"() => ({LINE})().includes('stop')", seconds=10)
        wait_until_idle(comfyui_server)
        entry = newest_run(comfyui_server)
        (told,) = entry["outputs"]["2"]["streamblocks"]
        (kept,) = comfyui_server.output_files(entry)
        made = pictures_of(kept)
        assert told["edited"] and "a blue square moves up" in told["track"]
        assert len(made) == 9 + 12 * (told["blocks"] - 1)

        click("track")
        wait_for(opened, "no track", "() => app.graph.nodes.some(n => n.type === 'StreamBlocksPromptTrack')")
        sampler = opened.graph_to_prompt()["2"]["inputs"]
        assert (sampler["blocks"], sampler["endless"], sampler["seed"]) == (told["blocks"], False, 31)
        opened.evaluate(QUEUE)
        page.wait_for_timeout(300)
        wait_until_idle(comfyui_server)
        again = newest_run(comfyui_server)
        (replay,) = comfyui_server.output_files(again)
        assert replay != kept and np.array_equal(pictures_of(replay), made)
        assert not again["outputs"]["2"]["streamblocks"][0]["edited"]
        opened.evaluate(SET_RENDERER, False)
        assert opened.problems() == []
