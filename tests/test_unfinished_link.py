"""The link to an unfinished video on the sampler's node, in real ComfyUI's page, with classic and with Vue nodes.

Skipped where ComfyUI (`$COMFYUI_PATH`), Chromium or playwright are missing.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

import av
import pytest

from chromium_page import ComfyPage, why_no_chromium
from comfyui_server import ComfyUIServer

if TYPE_CHECKING:
    from playwright.sync_api import Locator

ROOT = Path(__file__).resolve().parent.parent
WORKFLOW = ROOT / "example_workflows/text_to_video_stream.json"
SCREENSHOTS = ROOT / "output/screenshots"
LINE = ".streamblocks-unfinished"
SET_WIDGETS = """values => {
  const node = app.graph.nodes.find(n => n.type === 'StreamBlocksSampler')
  for (const [name, value] of Object.entries(values)) node.widgets.find(w => w.name === name).value = value
  node.setSize([460, node.computeSize()[1]])
}"""
# As undo does it.
MADE_ANEW = "async () => { await app.loadGraphData(app.graph.serialize()) }"
OTHER_WORKFLOW = "async () => { await app.loadGraphData({...app.graph.serialize(), id: crypto.randomUUID()}) }"
SET_RENDERER = "vue => app.extensionManager.setting.set('Comfy.VueNodes.Enabled', vue)"
# What the server sends, its length, and how many seconds the browser's own player finds in it.
FETCHED = """async url => {
  const answer = await fetch(url)
  const video = document.createElement('video')
  const seconds = await new Promise((found, failed) => {
    video.onloadedmetadata = () => found(video.duration)
    video.onerror = () => found(null)
    video.src = url
  })
  return [answer.headers.get('content-type'), (await answer.arrayBuffer()).byteLength, seconds]
}"""


def saved_values(page: ComfyPage) -> list[object]:
    """What the page would save of the sampler's widgets."""
    (sampler,) = (node for node in page.workflow()["nodes"] if node["type"] == "StreamBlocksSampler")
    return list(sampler["widgets_values"])


def is_whole(line: Locator) -> None:
    """The link is no higher than the line that the node gives it."""
    outer, link = line.bounding_box(), line.get_by_text("play").bounding_box()
    assert outer is not None and link is not None
    assert outer["y"] <= link["y"] and link["y"] + link["height"] <= outer["y"] + outer["height"]


def test_the_link_plays_saves_and_survives_undo(comfyui_server: ComfyUIServer) -> None:
    reason = why_no_chromium()
    if reason is not None:
        pytest.skip(reason)
    folder = comfyui_server.base / "output/streamblocks/unfinished"
    before = set(folder.glob("*.mp4"))
    with ComfyPage(comfyui_server.url, height=1300) as opened:
        page, line = opened.page, opened.page.locator(LINE)
        opened.load_workflow(WORKFLOW)
        values = saved_values(opened)
        opened.evaluate(SET_WIDGETS, {"blocks": 1000, "width": 64, "height": 64, "steps": 1, "seed": 21})
        opened.fit()
        with page.expect_response("**/prompt"):
            opened.evaluate("() => { app.queuePrompt(0, 1) }")
        # Blocks may come faster than the page looks.
        page.locator(".streamblocks-progress", has_text=re.compile(r"block ([3-9]|\d\d+) of")).wait_for(timeout=120_000)
        comfyui_server.interrupt()
        line.wait_for(timeout=60_000)
        (video,) = set(folder.glob("*.mp4")) - before
        kind, size, seconds = opened.evaluate(FETCHED, line.get_by_text("play").get_attribute("href"))
        assert (kind, size) == ("video/mp4", video.stat().st_size)
        with av.open(str(video)) as container:
            stream = container.streams.video[0]
            assert stream.average_rate is not None
            made = stream.frames
            assert seconds == pytest.approx(float(made / stream.average_rate), abs=0.01)
        assert line.inner_text().startswith(f"unfinished: {made} pictures")
        assert line.get_by_text("save").get_attribute("download") == video.name
        opened.fit()
        is_whole(line)
        opened.screenshot(SCREENSHOTS / "unfinished_classic_nodes.png")

        opened.evaluate(SET_RENDERER, True)
        page.wait_for_selector(f"[data-node-id] {LINE}")
        opened.fit()
        is_whole(line)
        opened.screenshot(SCREENSHOTS / "unfinished_Vue_nodes.png")
        opened.evaluate(OTHER_WORKFLOW)
        page.wait_for_timeout(300)
        assert line.count() == 0
        opened.load_workflow(WORKFLOW)
        page.wait_for_selector(f"[data-node-id] {LINE}")
        opened.evaluate(MADE_ANEW)
        page.wait_for_selector(f"[data-node-id] {LINE}")
        assert line.count() == 1
        assert saved_values(opened) == values
        page.reload()
        opened.wait_until_ready()
        assert line.count() == 0
        opened.load_workflow(WORKFLOW)
        page.wait_for_selector(f"[data-node-id] {LINE}")
        (sampler,) = (node for node in opened.graph_to_prompt().values() if node["class_type"] == "StreamBlocksSampler")
        assert "unfinished_video" not in sampler["inputs"]

        kept = opened.evaluate("() => sessionStorage.getItem('streamblocks.unfinished')")
        assert opened.problems() == []
        # As a resumed stream takes it along when it is finished.
        elsewhere = video.rename(video.with_suffix(".elsewhere"))
        opened.evaluate(MADE_ANEW)
        page.wait_for_selector(LINE, state="detached")
        elsewhere.rename(video)
        assert opened.evaluate("() => sessionStorage.getItem('streamblocks.unfinished')") == "[]"

        opened.evaluate("kept => sessionStorage.setItem('streamblocks.unfinished', kept)", kept)
        opened.evaluate(MADE_ANEW)
        page.get_by_label("Put this line away; the file stays.").click()
        assert line.count() == 0
        opened.evaluate(MADE_ANEW)
        page.wait_for_timeout(300)
        assert line.count() == 0 and video.exists()
        opened.evaluate(SET_RENDERER, False)
        # The browser's own words about the file that was not there.
        (said,) = opened.problems()
        assert "404" in said
