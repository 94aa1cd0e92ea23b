"""Stream Live Input in real ComfyUI's page, with classic and with Vue nodes: a camera feeds a stream that is made.

Skipped where ComfyUI (`$COMFYUI_PATH`), Chromium or playwright are missing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import av
import pytest

from chromium_page import ComfyPage, why_no_chromium
from comfyui_server import ComfyUIServer

ROOT = Path(__file__).resolve().parent.parent
WORKFLOW = ROOT / "example_workflows/text_to_video_stream.json"
SCREENSHOTS = ROOT / "output/screenshots"
# The last picture may come when the stream has ended; the browser says so by itself.
TOO_LATE = "409 (Conflict)"
SET_RENDERER = "vue => app.extensionManager.setting.set('Comfy.VueNodes.Enabled', vue)"
SAMPLER = "app.graph.nodes.find(n => n.type === 'StreamBlocksSampler')"
INPUT = "app.graph.nodes.find(n => n.type === 'StreamBlocksLiveInput')"
CONNECT = f"""() => {{
  const [sampler, input] = [{SAMPLER}, LiteGraph.createNode('StreamBlocksLiveInput')]
  input.pos = [sampler.pos[0] - 320, sampler.pos[1] + 260]
  app.graph.add(input)
  input.connect(0, sampler, sampler.inputs.findIndex(({{ name }}) => name === 'live'))
  const values = {{ endless: true, strength: 0 }}
  for (const widget of sampler.widgets) if (widget.name in values) widget.value = values[widget.name]
  return [Object.keys(input.serialize()).includes('widgets_values'), input.serialize().widgets_values]
}}"""
QUEUE = "() => app.queuePrompt(0, 1)"
CHOOSE = f"""source => {{
  const widget = {INPUT}.widgets.find(({{ name }}) => name === 'source')
  widget.value = source
  widget.callback(source)
}}"""
# As undo does it.
MADE_ANEW = "async () => { await app.loadGraphData(app.graph.serialize()) }"
TRACKS = """() => {
  window.tracks = []
  const ask = navigator.mediaDevices.getUserMedia.bind(navigator.mediaDevices)
  navigator.mediaDevices.getUserMedia = async (wish) => {
    const stream = await ask(wish)
    tracks.push(...stream.getTracks())
    return stream
  }
}"""
LIVE_TRACKS = "() => tracks.filter(({ readyState }) => readyState === 'live').length"
# A file as a page without such rules plays it.
ALLOWED_URL = "url => { URL.createObjectURL = () => url }"
FORBIDDEN = "violates the following Content Security Policy"
CAMERA_IS = """state => {
  const devices = navigator.mediaDevices
  const found = {
    denied: { getUserMedia: async () => { throw new DOMException('no', 'NotAllowedError') } },
    missing: { getUserMedia: async () => { throw new DOMException('no', 'NotFoundError') } },
    taken: { getUserMedia: async () => { throw new DOMException('in use', 'NotReadableError') } },
    insecure: undefined
  }[state]
  Object.defineProperty(navigator, 'mediaDevices', { value: found, configurable: true })
  return devices !== undefined
}"""
# Of the browser's own again.
CAMERA_AS_EVER = "() => { delete navigator.mediaDevices }"


@pytest.fixture(scope="module")
def opened(comfyui_server: ComfyUIServer) -> Iterator[ComfyPage]:
    reason = why_no_chromium()
    if reason is not None:
        pytest.skip(reason)
    with ComfyPage(comfyui_server.url, height=1300) as page:
        page.evaluate(TRACKS)
        yield page


class LiveInput:
    """The node in the page, and the frames that went from it to the server."""

    def __init__(self, tab: ComfyPage) -> None:
        self.tab = tab
        self.posts: list[tuple[int, bytes]] = []
        tab.page.on("response", self._note)

    def _note(self, response: Any) -> None:
        if response.url.endswith("/frames"):
            self.posts.append((response.status, response.request.post_data_buffer))

    def click(self, name: str) -> None:
        self.tab.page.locator(f".streamblocks-{name}").click()

    def wait_for(self, words: str, line: str = "live-line") -> None:
        self.tab.page.locator(f".streamblocks-{line}", has_text=words).wait_for(timeout=20_000)

    def until(self, is_so: Callable[[], bool]) -> None:
        for _ in range(200):
            if is_so():
                return
            self.tab.page.wait_for_timeout(50)
        raise AssertionError("it did not become so")

    def live_tracks(self) -> int:
        return int(self.tab.evaluate(LIVE_TRACKS))


@pytest.fixture(params=[False, True], ids=["classic", "Vue"])
def live(request: pytest.FixtureRequest, opened: ComfyPage) -> Iterator[LiveInput]:
    opened.evaluate(SET_RENDERER, request.param)
    opened.load_workflow(WORKFLOW)
    # One widget that is saved: the choice.
    assert opened.evaluate(CONNECT) == [True, ["camera"]]
    opened.fit()
    yield LiveInput(opened)
    opened.evaluate(SET_RENDERER, False)
    assert [said for said in opened.problems() if TOO_LATE not in said and FORBIDDEN not in said] == []


def test_a_camera_feeds_a_stream(live: LiveInput, comfyui_server: ComfyUIServer, request: Any) -> None:
    tab = live.tab
    live.wait_for("Press start")
    before = set(comfyui_server.base.glob("output/video/*.mp4"))
    tab.evaluate(QUEUE)
    # The stream waits, and nothing leaves the page.
    live.wait_for("waiting for the first picture", "progress")
    assert live.posts == [] and live.live_tracks() == 0
    live.click("live-start")
    live.wait_for("pictures sent")
    live.wait_for("block 2", "progress")
    tab.screenshot(SCREENSHOTS / f"live_input_{request.node.callspec.id}.png")
    # The camera stays on.
    tab.evaluate(MADE_ANEW)
    assert live.live_tracks() == 1
    sent = len(live.posts)
    live.until(lambda: len(live.posts) > sent + 3)
    live.click("stop")
    live.wait_for("stopped and kept", "progress")
    live.wait_for("takes no more")
    live.click("live-stop")
    assert live.live_tracks() == 0
    statuses = [status for status, _ in live.posts]
    assert statuses[:-1] == [200] * (len(statuses) - 1) and statuses[-1] in (200, 404, 409)
    assert all(body.startswith(b"\xff\xd8\xff") for _, body in live.posts)
    live.until(lambda: set(comfyui_server.base.glob("output/video/*.mp4")) != before)
    (video,) = set(comfyui_server.base.glob("output/video/*.mp4")) - before
    with av.open(str(video)) as container:
        pictures = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    assert len(pictures) >= 9 + 12
    red, green, blue = pictures[-1].reshape(-1, 3).mean(0)
    assert green > red + 40 and green > blue + 40


only_classic = pytest.mark.parametrize("live", [False], ids=["classic"], indirect=True)


@only_classic
def test_files_and_the_camera_are_released(live: LiveInput, comfyui_server: ComfyUIServer) -> None:
    tab, page = live.tab, live.tab.page
    tab.evaluate(CHOOSE, "video file of the page")
    live.wait_for("Choose a video file; it plays")
    files = page.locator(".streamblocks-live-file")
    short = write_webm(comfyui_server.base / "input/short.webm")
    files.set_input_files(short)
    # This server was started with --disable-api-nodes.
    live.wait_for("This server's pages may not play files of yours")
    assert not page.locator(".streamblocks-live-start").is_visible()
    tab.evaluate(ALLOWED_URL, "/object_info")
    files.set_input_files(short)
    live.wait_for("The browser cannot play short.webm")
    tab.evaluate(ALLOWED_URL, "/view?filename=short.webm&type=input")
    files.set_input_files(short)
    live.click("live-start")
    live.wait_for("Ready.")
    live.until(lambda: tab.evaluate("() => document.querySelector('.streamblocks-live video').currentTime > 0.05"))
    tab.evaluate(CHOOSE, "camera")
    live.wait_for("Press start")
    live.click("live-start")
    live.until(lambda: live.live_tracks() == 1)
    tab.evaluate(f"() => app.graph.remove({INPUT})")
    live.until(lambda: live.live_tracks() == 0)
    assert live.posts == []


@only_classic
def test_why_there_is_no_camera_is_said(live: LiveInput) -> None:
    said = {
        "insecure": "only to pages on https or localhost",
        "denied": "The browser refused the camera: allow it",
        "missing": "There is no camera: connect one",
        "taken": "The camera does not start (in use): close other programs",
    }
    for state, words in said.items():
        live.tab.evaluate(CAMERA_IS, state)
        live.click("live-start")
        live.wait_for(words)
    live.tab.evaluate(CAMERA_AS_EVER)


def write_webm(path: Path) -> Path:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libvpx", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for _ in range(10):
            for packet in stream.encode(av.VideoFrame(64, 48, "yuv420p")):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    return path
