"""What a node says: a line on it in real ComfyUI's page, with classic and with Vue nodes; its store in JavaScript.

The page is skipped where ComfyUI (`$COMFYUI_PATH`), Chromium or playwright are missing.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from chromium_page import ComfyPage, why_no_chromium
from comfyui_server import ComfyUIServer

ROOT = Path(__file__).resolve().parent.parent
WORKFLOW = ROOT / "example_workflows/text_to_video_stream.json"
SCREENSHOTS = ROOT / "output/screenshots"
LINE = ".streamblocks-says"
SET_RENDERER = "vue => app.extensionManager.setting.set('Comfy.VueNodes.Enabled', vue)"
ADD_FREE = """values => {
  const sampler = app.graph.nodes.find(n => n.type === 'StreamBlocksSampler')
  for (const [name, value] of Object.entries(values)) sampler.widgets.find(w => w.name === name).value = value
  const free = LiteGraph.createNode('StreamBlocksFreeMemory')
  free.pos = [sampler.pos[0], sampler.pos[1] - 250]
  app.graph.add(free)
  sampler.connect(3, free, 0)
}"""
SAID_BY = """type => {
  const node = app.graph.nodes.find(n => n.type === type)
  return node.widgets.filter(w => w.name === 'streamblocks_says').map(w => w.element.textContent)
}"""
WIDGETS = """type => app.graph.nodes.find(n => n.type === type).widgets.map(w => w.name)"""
MADE_ANEW = "async () => { await app.loadGraphData(app.graph.serialize()) }"
OTHER_WORKFLOW = "async () => { await app.loadGraphData({...app.graph.serialize(), id: crypto.randomUUID()}) }"
FREE, SAMPLER = "StreamBlocksFreeMemory", "StreamBlocksSampler"


def run(page: ComfyPage) -> None:
    page.evaluate("() => { app.queuePrompt(0, 1) }")
    page.page.wait_for_function(
        f"() => (({SAID_BY})('{FREE}')[0] ?? '').startsWith('Freed ')", timeout=120_000, polling=50
    )


def values_of(page: ComfyPage) -> list[Any]:
    """What is saved and sent of the two nodes that say something; the page may show a video on a third."""
    saved = {node["type"]: node.get("widgets_values") for node in page.workflow()["nodes"]}
    sent = {node["class_type"]: node["inputs"] for node in page.graph_to_prompt().values()}
    return [values[name] for values in (saved, sent) for name in (FREE, SAMPLER)]


def test_nodes_say_it_once_through_undo_and_other_workflows(comfyui_server: ComfyUIServer) -> None:
    reason = why_no_chromium()
    if reason is not None:
        pytest.skip(reason)
    with ComfyPage(comfyui_server.url, height=1300) as opened:
        page = opened.page
        opened.load_workflow(WORKFLOW)
        opened.evaluate(ADD_FREE, {"blocks": 1, "width": 64, "height": 64, "steps": 1, "seed": 31})
        values = values_of(opened)

        run(opened)
        (said,) = opened.evaluate(SAID_BY, FREE)
        # A sampler with a player says it there.
        on_sampler = opened.evaluate(SAID_BY, SAMPLER)
        assert len(on_sampler) == ("stream_player" not in opened.evaluate(WIDGETS, SAMPLER))
        assert all(line.startswith("block 1 of 1: ") for line in on_sampler)
        # Nothing of ComfyUI's own says it a second time.
        assert page.locator(LINE).count() == 1 + len(on_sampler)
        assert page.get_by_text("of tensors").count() == 1
        assert not any("preview" in name for name in opened.evaluate(WIDGETS, FREE))
        assert values_of(opened) == values
        opened.fit()
        opened.screenshot(SCREENSHOTS / "status_line_classic_nodes.png")

        opened.evaluate(SET_RENDERER, True)
        page.wait_for_selector(f"[data-node-id] {LINE}")
        assert page.get_by_text("of tensors").count() == 1
        opened.fit()
        opened.screenshot(SCREENSHOTS / "status_line_Vue_nodes.png")
        kept = opened.workflow()
        opened.evaluate(MADE_ANEW)
        page.wait_for_selector(f"[data-node-id] {LINE}")
        assert opened.evaluate(SAID_BY, FREE) == [said]
        opened.evaluate(OTHER_WORKFLOW)
        page.wait_for_timeout(200)
        assert page.locator(LINE).count() == 0
        opened.evaluate("async graph => { await app.loadGraphData(graph) }", kept)
        assert opened.evaluate(SAID_BY, FREE) == [said]
        opened.evaluate(SET_RENDERER, False)
        assert opened.problems() == []


@pytest.mark.skipif(shutil.which("node") is None, reason="node is not installed")
def test_lines_are_of_a_workflow_and_go_when_the_node_runs_again(tmp_path: Path) -> None:
    program = tmp_path / "lines.mjs"
    program.write_text(
        f"""
import assert from 'node:assert'
import {{ SaidLines, isIn, wordsOf }} from '{(ROOT / "web/said_lines.mjs").as_uri()}'
import {{ loadMessages, text }} from '{(ROOT / "web/messages.mjs").as_uri()}'
const lines = new SaidLines()
const line = (workflow, id, values = {{}}) => ({{ node: '2', workflow, id, values, text: 'in English' }})
lines.add(line('a', 'loading', {{ component: 'vae', percent: 5, gb: '0.51' }}))
lines.add(line('b', 'stopped_empty'))
lines.add(line('a', 'nothing_written'))
assert.deepStrictEqual(lines.all().map(l => [l.workflow, l.id]), [['a', 'nothing_written'], ['b', 'stopped_empty']])
lines.add(line('a', null))
assert.deepStrictEqual(lines.all().map(l => l.workflow), ['b'])
assert(isIn(line('a'), 'a') && !isIn(line('a'), 'b') && isIn(line(null), 'b'))
const loading = line('a', 'loading', {{ component: 'vae', percent: 5, gb: '0.51' }})
assert.strictEqual(wordsOf(loading, text), 'in English')
const i18n = {{ en: {json.dumps(json.loads((ROOT / "locales/en/main.json").read_text()))},
  zh: {{ streamblocks: {{ says: {{ loading: '{{component}} {{percent}}' }} }} }}, de: {{}} }}
let locale = 'zh'
await loadMessages(async () => ({{ ok: true, json: async () => i18n }}), () => locale)
assert.strictEqual(wordsOf(loading, text), 'vae 5')
assert.strictEqual(wordsOf(line('a', 'stopped_empty'), text), 'Stopped; no picture was made.')
locale = 'de'
assert.strictEqual(wordsOf(loading, text), 'loading vae: 5 % of 0.51 GB')
"""
    )
    done = subprocess.run(["node", str(program)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
