"""The question about a model's code, in real ComfyUI's page: asked once behind a refused run, answered by a real click.

Skipped where ComfyUI (`$COMFYUI_PATH`), Chromium or playwright are missing.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from canary_repository import write_canary_repository

from chromium_page import ComfyPage, why_no_chromium
from comfyui_server import ComfyUIServer

ROOT = Path(__file__).resolve().parent.parent
WORKFLOW = ROOT / "example_workflows/text_to_video_stream.json"
DIALOG = "dialog.streamblocks-code"
# As a stranger's workflow would: the model, its own blocks, and the tick of old.
SET_WIDGETS = """() => {
  const set = (type, values) => {
    const node = app.graph.nodes.find(n => n.type === type)
    for (const [name, value] of Object.entries(values)) node.widgets.find(w => w.name === name).value = value
  }
  const own = {blocks_from: "the repository's own", trust_remote_code: true}
  set('StreamBlocksLoadPipeline', {model: 'diffusers/canary', ...own})
  set('StreamBlocksSampler', {blocks: 1, width: 32, height: 32, steps: 1})
}"""
QUEUE = "() => { app.queuePrompt(0, 1) }"
CLICK_BY_SCRIPT = f"""() => {{
  const dialog = document.querySelector('{DIALOG}')
  dialog.querySelector('input').click()
  const button = dialog.querySelector('[data-answer=allow]')
  button.disabled = false
  button.click()
}}"""


def test_a_real_click_allows(comfyui_server: ComfyUIServer, tiny_folder: Path, tmp_path: Path) -> None:
    reason = why_no_chromium()
    if reason is not None:
        pytest.skip(reason)
    canary = tmp_path / "canary"
    folder = comfyui_server.base / "models/diffusers/canary"
    write_canary_repository(folder, tiny_folder, canary)
    allowed = comfyui_server.base / "user/__streamblocks/allowed_code.json"
    with ComfyPage(comfyui_server.url) as opened:
        page, dialog = opened.page, opened.page.locator(DIALOG)
        opened.load_workflow(WORKFLOW)
        opened.evaluate(SET_WIDGETS)
        opened.evaluate(QUEUE)
        dialog.wait_for(timeout=120_000)
        # The summary is no button; the text of the file is there, and has not run.
        dialog.locator("summary", has_text="blocks.py").click()
        assert "class ForeignBlocks" in dialog.inner_text() and not canary.exists()
        opened.screenshot(ROOT / "output/screenshots/code_question.png")
        page.wait_for_timeout(1600)
        opened.evaluate(CLICK_BY_SCRIPT)
        page.wait_for_timeout(300)
        assert not allowed.exists()
        assert dialog.locator("input").is_checked()
        dialog.locator("[data-answer=allow]").click()
        dialog.get_by_text("Allowed, until a byte of it changes.").wait_for()
        (entry,) = json.loads(allowed.read_text())["allowed"]
        assert entry["place"] == str(folder.resolve()) and not canary.exists()
        dialog.locator("[data-answer=refuse]").click()
        assert dialog.count() == 0
        opened.evaluate(QUEUE)
        for _ in range(600):
            if canary.exists():
                break
            page.wait_for_timeout(100)
        assert canary.exists()
