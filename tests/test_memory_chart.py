"""The memory chart on the sampler's node, in real ComfyUI's page, with classic and with Vue nodes.

Skipped where ComfyUI (`$COMFYUI_PATH`), Chromium or playwright are missing.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import pytest

from chromium_page import ComfyPage, why_no_chromium
from comfyui_server import ComfyUIServer

ROOT = Path(__file__).resolve().parent.parent
WORKFLOW = ROOT / "example_workflows/text_to_video_stream.json"
SCREENSHOTS = ROOT / "output/screenshots"
CHART, FOLD = ".streamblocks-memory-chart", ".streamblocks-fold-chart"
BLOCKS = 6

SET_RENDERER = "vue => app.extensionManager.setting.set('Comfy.VueNodes.Enabled', vue)"
SET_WIDGETS = """values => {
  const node = app.graph.nodes.find(n => n.type === 'StreamBlocksSampler')
  for (const [name, value] of Object.entries(values)) node.widgets.find(w => w.name === name).value = value
  node.setSize([460, node.computeSize()[1]])
}"""
WHAT_IT_SAYS = f"() => document.querySelector('{CHART}')?.getAttribute('aria-label') ?? ''"
PICTURE = f"() => document.querySelector('{CHART} canvas').toDataURL()"
IS_SEEN = f"""() => {{
  const box = document.querySelector('{CHART} canvas').getBoundingClientRect()
  return box.width > 100 && box.height > 60 && box.top >= 0 && box.bottom <= innerHeight
}}"""


@pytest.fixture(scope="module")
def opened(comfyui_server: ComfyUIServer) -> Iterator[ComfyPage]:
    reason = why_no_chromium()
    if reason is not None:
        pytest.skip(reason)
    with ComfyPage(comfyui_server.url, height=1300) as page:
        yield page


@pytest.fixture(params=[False, True], ids=["classic nodes", "Vue nodes"])
def page(request: pytest.FixtureRequest, opened: ComfyPage) -> Iterator[ComfyPage]:
    opened.evaluate(SET_RENDERER, request.param)
    yield opened
    opened.evaluate(SET_RENDERER, False)


def wait_for_block(page: ComfyPage, block: int) -> str:
    """Until the chart shows `block` (from 1) or a later one; its picture then."""
    expression = f"block => Number((({WHAT_IT_SAYS})().match(/block (\\d+) of/) ?? [])[1] ?? 0) >= block"
    page.page.wait_for_function(expression, arg=block, timeout=120_000)
    page.page.wait_for_timeout(100)
    return str(page.evaluate(PICTURE))


def wait_until_idle(server: ComfyUIServer) -> None:
    deadline = time.monotonic() + 120
    while server.queue_sizes() != (0, 0) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert server.queue_sizes() == (0, 0)


def test_the_chart_moves(page: ComfyPage, comfyui_server: ComfyUIServer, request: pytest.FixtureRequest) -> None:
    name = request.node.callspec.id.replace(" ", "_")
    # A stream of this workflow that has ended would be shown.
    page.load_workflow(json.loads(WORKFLOW.read_text()) | {"id": str(uuid4())})
    # Another seed for each, or ComfyUI answers out of its cache.
    widgets = {"blocks": BLOCKS, "width": 64, "height": 64, "steps": 1, "seed": len(name)}
    page.evaluate(SET_WIDGETS, widgets)
    page.fit()
    # Folded up: it takes no room, and neither does what would unfold it.
    assert page.page.locator(CHART).count() == 0 and not page.page.locator(FOLD).is_visible()
    is_vue = page.page.locator("[data-node-id]").count() > 0
    assert is_vue == ("Vue" in request.node.callspec.id)
    # The player that it is in is neither an input of the node nor a value of the workflow.
    (sampler,) = (node for node in page.graph_to_prompt().values() if node["class_type"] == "StreamBlocksSampler")
    assert "stream_player" not in sampler["inputs"]

    page.evaluate("() => { app.queuePrompt(0, 1) }")
    page.page.locator(FOLD).click(timeout=120_000)
    early = wait_for_block(page, 2)
    page.fit()
    assert page.evaluate(IS_SEEN)
    page.screenshot(SCREENSHOTS / f"memory_chart_{name}_running.png")
    later = wait_for_block(page, 4)
    last = wait_for_block(page, BLOCKS)
    assert len({early, later, last}) == 3
    page.screenshot(SCREENSHOTS / f"memory_chart_{name}.png")
    wait_until_idle(comfyui_server)

    assert page.problems() == []


@pytest.mark.skipif(shutil.which("node") is None, reason="node is not installed: the chart's points are not tested")
def test_points_are_bounded_and_nodes_in_subgraphs_found(tmp_path: Path) -> None:
    program = tmp_path / "points.mjs"
    program.write_text(
        f"""
import assert from 'node:assert'
import {{ MemoryPoints, formatBytes }} from '{(ROOT / "web/memory_points.mjs").as_uri()}'
import {{ findNode }} from '{(ROOT / "web/execution_id.mjs").as_uri()}'
const points = new MemoryPoints()
const point = (block, more) => ({{
  first: false, stage: 'step 0', block, blocks: 5000, allocated: 10, peak: 20, card: null, owners: [], event: '',
  ...more
}})
for (let block = 0; block < 5000; block++) {{
  points.add(point(block, {{ first: block === 0, peak: 30 }}))
  assert.strictEqual(points.latest.stage, 'step 0')
  points.add(point(block, {{ stage: 'block end', owners: [['a', 4], ['grows', block]] }}))
}}
assert(points.columns.length > 64 && points.columns.length <= 256)
assert(points.columns.every(column => column.peak === 30 && column.block % points.stride === 0))
assert.deepStrictEqual(points.ownerNames(4), ['a', 'grows'])
points.add(point(0, {{ first: true }}))
assert.strictEqual(points.columns.length, 0)
assert.strictEqual(formatBytes(0), '0 bytes')
assert.strictEqual(formatBytes(7.14 * 2 ** 30), '7.14 GiB')
const inner = {{ getNodeById: id => (id === '5' ? 'found' : null) }}
const root = {{ getNodeById: id => (id === '12' ? {{ subgraph: inner }} : null) }}
assert.strictEqual(findNode(root, '12:5'), 'found')
assert.strictEqual(findNode(root, '3:5'), null)
"""
    )
    done = subprocess.run(["node", str(program)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
