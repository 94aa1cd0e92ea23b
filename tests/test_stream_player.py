"""The player on the sampler's node in real ComfyUI's page, classic and Vue nodes; its streams are drawn, not made.

Skipped where ComfyUI (`$COMFYUI_PATH`), Chromium or playwright are missing.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import pytest
from fake_live_streams import FakeLiveStreams, FakeStream

from chromium_page import ComfyPage, why_no_chromium
from comfyui_server import ComfyUIServer

if TYPE_CHECKING:
    from playwright.sync_api import Page

ROOT = Path(__file__).resolve().parent.parent
WORKFLOW = ROOT / "example_workflows/text_to_video_stream.json"
SAVED: dict[str, Any] = json.loads(WORKFLOW.read_text())
(SAVED_SAMPLER,) = (node for node in SAVED["nodes"] if node["type"] == "StreamBlocksSampler")
VALUES, HEIGHT = SAVED_SAMPLER["widgets_values"], SAVED_SAMPLER["size"][1]
SCREENSHOTS = ROOT / "output/screenshots"
# The browser says so of every answer of this kind.
REFUSED = "409 (Conflict)"
SET_RENDERER = "vue => app.extensionManager.setting.set('Comfy.VueNodes.Enabled', vue)"
QUEUED = "detail => app.api.dispatchEvent(new CustomEvent('streamblocks.stream', { detail }))"
# As undo does it.
MADE_ANEW = "async () => { await app.loadGraphData(app.graph.serialize()) }"
OTHER_WORKFLOW = "async () => { await app.loadGraphData({...app.graph.serialize(), id: crypto.randomUUID()}) }"
SAMPLER = "app.graph.nodes.find(n => n.type === 'StreamBlocksSampler')"
COPY_OF_IT = f"""length => {{
  const copy = {SAMPLER}.clone()
  const values = copy.serialize().widgets_values
  return [values.slice(0, length), copy.size[1]]
}}"""
SET_WIDTH = f"width => {{ {SAMPLER}.setSize([width, {SAMPLER}.size[1]]); app.canvas.setDirty(true, true) }}"
PICTURE = "() => document.querySelector('.streamblocks-pictures').toDataURL()"
IS_DRAWN = """() => {
  const canvas = document.querySelector('.streamblocks-pictures')
  return canvas.offsetParent !== null && canvas.getContext('2d').getImageData(3, 3, 1, 1).data[3] === 255
}"""
CHART = ".streamblocks-memory-chart"
LOOK_AWAY = "away => { app.canvas.ds.offset[0] += away ? 9000 : -9000; app.canvas.setDirty(true, true) }"
HIDE = """hidden => {
  Object.defineProperty(document, 'hidden', { get: () => hidden, configurable: true })
  document.dispatchEvent(new Event('visibilitychange'))
}"""


@dataclass
class Player:
    """The player in a tab, on a workflow that no other test has."""

    tab: ComfyPage
    workflow: dict[str, Any] = field(default_factory=lambda: SAVED | {"id": str(uuid4())})
    is_vue: bool = False

    @property
    def name(self) -> str:
        return f"{'Vue' if self.is_vue else 'classic'}_nodes"

    def load(self) -> None:
        self.tab.load_workflow(self.workflow)

    def click(self, name: str) -> None:
        self.tab.page.locator(f".streamblocks-{name}").click()

    def offers(self, name: str) -> bool:
        return self.tab.page.locator(f".streamblocks-{name}").is_visible()

    def wait_for(self, words: str, line: str = "progress") -> None:
        self.tab.page.locator(f".streamblocks-{line}", has_text=words).wait_for(timeout=10_000)

    def heights(self) -> tuple[int, int]:
        """Of the node, and as it would be saved."""
        now, saved = self.tab.evaluate(f"() => [{SAMPLER}.size[1], {SAMPLER}.serialize().size[1]]")
        return now, saved

    def saved_values(self) -> list[object]:
        """As many as the workflow has: it was saved before later inputs came."""
        return list(self.tab.evaluate(f"() => {SAMPLER}.serialize().widgets_values"))[: len(VALUES)]

    def until(self, is_so: Callable[[], bool]) -> None:
        for _ in range(100):
            if is_so():
                return
            self.tab.page.wait_for_timeout(50)
        raise AssertionError(f"it did not become so: {is_so}")


@pytest.fixture(scope="module")
def fake() -> Iterator[FakeLiveStreams]:
    with FakeLiveStreams() as streams:
        yield streams


@pytest.fixture(scope="module")
def opened(comfyui_server: ComfyUIServer, fake: FakeLiveStreams) -> Iterator[ComfyPage]:
    reason = why_no_chromium()
    if reason is not None:
        pytest.skip(reason)
    with ComfyPage(comfyui_server.url, height=1300) as page:
        fake.send_page_to_it(page.page)
        yield page


@pytest.fixture(params=[False, True], ids=["classic", "Vue"])
def player(request: pytest.FixtureRequest, opened: ComfyPage) -> Iterator[Player]:
    opened.evaluate(SET_RENDERER, request.param)
    player = Player(opened, is_vue=request.param)
    player.load()
    opened.fit()
    yield player
    opened.evaluate(SET_RENDERER, False)
    assert [said for said in opened.problems() if REFUSED not in said] == []


_numbers = count()


def begin(fake: FakeLiveStreams, player: Player, **fields: Any) -> FakeStream:
    """A stream that this page queued."""
    stream = fake.add(f"prompt-{next(_numbers)}", "2", player.workflow["id"], **fields)
    ids = {name: stream.header[name] for name in ("prompt_id", "node", "workflow")}
    player.tab.evaluate(QUEUED, ids | {"token": stream.token})
    return stream


def test_it_plays_drops_and_outlives_the_node(player: Player, fake: FakeLiveStreams) -> None:
    tab, page = player.tab, player.tab.page
    # Vue nodes may need more room than the node was saved with.
    idle = player.heights()[0]
    assert player.saved_values() == VALUES and player.heights() == (idle,) * 2 and idle >= HEIGHT
    player.wait_for("plays here")
    stream = begin(fake, player, next={"block": 12, "prompt": "a storm"}, rate=6.0)
    stream.update(says={"id": "loading", "values": {"component": "vae", "percent": 40, "gb": "0.5"}})
    player.wait_for("loading vae: 40 %")
    stream.make_block()
    player.wait_for("block 2 of 9 · 0.8 s · 6 fps")
    player.wait_for("now: a calm sea", "prompt")
    player.wait_for("from block 13: a storm", "coming")
    player.until(lambda: tab.evaluate(IS_DRAWN))
    # Twelve pictures in two seconds, in the page's own time.
    first = tab.evaluate(PICTURE)
    page.wait_for_timeout(400)
    assert tab.evaluate(PICTURE) != first
    tall, kept = player.heights()
    assert kept == idle < tall - 200
    assert player.saved_values() == VALUES
    assert tab.evaluate(COPY_OF_IT, len(VALUES)) == [VALUES, idle]
    tab.evaluate(SET_WIDTH, 700)
    # Pictures of 320 x 180, on a node that is 280 wider.
    player.until(lambda: abs(player.heights()[0] - tall - 280 * 180 / 320) < 3)
    tab.evaluate(SET_WIDTH, 420)
    player.until(lambda: abs(player.heights()[0] - tall) < 3)
    player.click("fold-chart")
    chart = page.locator(CHART)
    assert "block 1 of 9" in (chart.get_attribute("aria-label") or "")
    tab.fit()
    tab.screenshot(SCREENSHOTS / f"player_{player.name}.png")

    away = HIDE if player.is_vue else LOOK_AWAY
    tab.evaluate(away, True)
    page.wait_for_timeout(300)
    assert stream.sent_pictures == [0]
    for _ in range(50):
        stream.make_block()
    page.wait_for_timeout(200)
    assert stream.sent_pictures == [0]
    tab.evaluate(away, False)
    player.until(lambda: stream.sent_pictures == [0, 50])

    tab.evaluate(MADE_ANEW)
    player.until(lambda: tab.evaluate(IS_DRAWN))
    assert chart.count() == 1 and abs(player.heights()[1] - idle) < 1
    tab.evaluate(OTHER_WORKFLOW)
    player.wait_for("plays here")
    assert chart.count() == 0 and all(abs(height - idle) < 1 for height in player.heights())
    player.load()
    player.until(lambda: tab.evaluate(IS_DRAWN) and chart.count() == 1)
    lies = {"id": "stopped", "values": {"pictures": 612, "file": "streamblocks/unfinished/stream_00001_.mp4"}}
    stream.end("cancelled", says=lies)
    # A file's path is longer than the line, and the node has a link.
    player.wait_for("cancelled after block 51 · 38.")
    assert "unfinished/stream_00001_.mp4" in (page.locator(".streamblocks-progress").get_attribute("title") or "")
    player.click("fold-chart")
    player.click("fold-pictures")
    # Folded up, it takes one line.
    assert all(abs(height - idle) < 1 for height in player.heights())


def another_tab_steers(player: Player, fake: FakeLiveStreams, stream: FakeStream) -> None:
    """A shared link opens the workflow, which joins by the list of streams and shows the memory of all blocks."""
    prompt_id = stream.header["prompt_id"]
    entry = {"prompt": [0, prompt_id, {}, {"extra_pnginfo": {"workflow": player.workflow}}, []]}

    def prepare(page: Page) -> None:
        fake.send_page_to_it(page)
        page.route(f"**/history/{prompt_id}", lambda route: route.fulfill(json={prompt_id: entry}))

    other = Player(player.tab.another_tab(f"/#streamblocks={prompt_id}/2/{stream.token}", prepare), player.workflow)
    other.wait_for("block 2 of 9")
    other.tab.fit()
    other.click("fold-chart")
    assert "block 1 of 9" in (other.tab.page.locator(CHART).get_attribute("aria-label") or "")
    other.click("pause")
    player.wait_for("pausing behind block 2")
    assert other.tab.problems() == []
    other.tab.page.close()


def test_it_steers_and_keeps_the_track(player: Player, fake: FakeLiveStreams) -> None:
    tab, page = player.tab, player.tab.page
    stream = begin(fake, player, edited=True, track="0: a {calm} sea\n1: a storm")
    stream.make_block()
    player.wait_for("block 2 of 9")
    page.locator(".streamblocks-pictures").wait_for()

    def asked() -> dict[str, Any]:
        return dict(stream.asked[-1])

    page.locator(".streamblocks-pause").press("Enter")
    player.wait_for("pausing behind block 2")
    # The keyboard stays with the row.
    assert tab.evaluate("() => document.activeElement.className") == "streamblocks-resume"
    stream.update(state="paused")
    player.wait_for("paused before block 2")
    player.click("resume")
    player.until(lambda: asked() == {"token": stream.token, "action": "resume"})
    assert not player.offers("apply")
    text = page.locator("[data-node-id='2'] textarea, textarea.comfy-multiline-input").last
    text.fill("a storm")
    player.click("apply")
    edit = {"token": stream.token, "action": "edit", "prompt": "a storm"}
    player.until(lambda: asked() == edit)
    player.wait_for("from the next block: a storm", "coming")
    player.until(lambda: not player.offers("apply"))
    text.fill("two storms")
    text.press("Control+Enter")
    player.until(lambda: asked() == edit | {"prompt": "two storms"})
    stream.refusal = (409, "The stream has ended: nothing of it can be changed any more.")
    text.fill("three storms")
    player.click("apply")
    player.wait_for("The stream has ended", "coming")
    stream.refusal = None

    if player.is_vue:
        another_tab_steers(player, fake, stream)
    player.click("stop")
    player.until(lambda: asked() == {"token": stream.token, "action": "stop"})
    player.wait_for("stopping behind block 2 of 9")
    # Made, and not yet over.
    stream.update(blocks_made=2, seconds=1.5)
    player.wait_for("stopping behind block 2 of 9… · 1.5 s")
    stream.update(blocks_made=1)
    stream.end("stopped")
    player.wait_for("stopped and kept after block 1")
    assert not player.offers("stop")
    player.click("track")
    tab.wait_for_graph(len(SAVED["nodes"]) + 1)
    sampler = tab.graph_to_prompt()["2"]["inputs"]
    track = tab.graph_to_prompt()[sampler["track"][0]]
    assert track["class_type"] == "StreamBlocksPromptTrack"
    assert track["inputs"] == {"text": "0: a {calm} sea\n1: a storm", "interpolation": "linear"}
    assert (sampler["blocks"], sampler["seconds"]) == (1, 0)
    tab.fit()
    tab.screenshot(SCREENSHOTS / f"track_{player.name}.png")
    tab.evaluate("async () => { await app.extensionManager.command.execute('Comfy.Undo') }")
    tab.wait_for_graph(len(SAVED["nodes"]))
    assert tab.graph_to_prompt()["2"]["inputs"]["blocks"] == 5


def test_300_blocks_leave_nothing_behind(opened: ComfyPage, fake: FakeLiveStreams) -> None:
    player = Player(opened)
    player.load()
    opened.fit()
    stream = begin(fake, player, blocks=None, rate=100.0)
    stream.size, stream.frames = (32, 32), 2
    session = opened.page.context.new_cdp_session(opened.page)

    def held() -> tuple[int, dict[str, int]]:
        session.send("HeapProfiler.collectGarbage")
        return session.send("Runtime.getHeapUsage")["usedSize"], session.send("Memory.getDOMCounters")

    def make(blocks: int) -> None:
        for _ in range(blocks):
            stream.make_block(prompt=f"prompt {stream.header['blocks_made']}")
            opened.page.wait_for_timeout(8)
        player.wait_for(f"block {stream.header['blocks_made'] + 1} ·")

    player.wait_for("loading")
    make(30)
    player.click("fold-chart")
    make(30)
    before, dom = held()
    make(300)
    after, dom_after = held()
    print(f"heap {before} -> {after} bytes, page {dom} -> {dom_after}")
    assert after - before < 2**20
    assert dom_after["nodes"] - dom["nodes"] < 20 and dom_after["jsEventListeners"] - dom["jsEventListeners"] < 20
    # Removed while its stream runs: what is told of it later is ignored.
    opened.evaluate(f"() => app.graph.remove({SAMPLER})")
    stream.make_block()
    stream.end("stopped")
    opened.page.wait_for_timeout(300)
    assert opened.page.locator(".streamblocks-player").count() == 0
    assert [said for said in opened.problems() if REFUSED not in said] == []
