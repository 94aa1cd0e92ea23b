"""The real page in Chinese: no English word of ours is left on the nodes and their pages, but names.

Skipped where ComfyUI (`$COMFYUI_PATH`), Chromium or playwright are missing.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from chinese_page import every_node, help_page, page_in_chinese, shown_texts, tooltip
from chinese_texts import all_english_words

from chromium_page import ComfyPage, why_no_chromium
from comfyui_server import ComfyUIServer

ROOT = Path(__file__).resolve().parent.parent
SCREENSHOTS = ROOT / "output/screenshots"
TEXTS = json.loads((ROOT / "locales/zh/nodeDefs.json").read_text(encoding="utf-8"))
SET_RENDERER = "vue => app.extensionManager.setting.set('Comfy.VueNodes.Enabled', vue)"
# The page's own: the name of the pack's folder.
OF_THE_PAGE = {"my-stream"}


@pytest.fixture(scope="module")
def page(comfyui_server: ComfyUIServer) -> Iterator[ComfyPage]:
    reason = why_no_chromium()
    if reason is not None:
        pytest.skip(reason)
    with page_in_chinese(comfyui_server) as opened:
        yield opened


@pytest.mark.parametrize("vue", [True, False], ids=["Vue", "classic"])
def test_no_english_word_of_ours_is_left_on_the_nodes(vue: bool, page: ComfyPage) -> None:
    try:
        page.evaluate(SET_RENDERER, vue)
        page.load_workflow(every_node())
        texts = shown_texts(page)
        page.screenshot(SCREENSHOTS / f"chinese_{'vue' if vue else 'classic'}.png")
        assert {"流式分块采样器", "保存由它生成的视频", "种子", "滚动窗口", "关于这个工作流"} <= set(texts)
        assert all_english_words(set(texts) - OF_THE_PAGE) == {}
        if vue:
            # With signs of the page's own message format.
            whole = TEXTS["StreamBlocksPromptThen"]["inputs"]["prompt"]["tooltip"]
            assert "||" in whole and tooltip(page, "StreamBlocksPromptThen", "提示词") == whole
        assert page.unknown_nodes() == [] and page.problems() == []
    finally:
        page.evaluate(SET_RENDERER, False)


def test_a_node_has_its_page_in_chinese(page: ComfyPage) -> None:
    page.load_workflow(every_node())
    page.fit()
    text = help_page(page, "StreamBlocksSaveStream")
    assert text.startswith("保存视频流") and "不重新编码" in text
    assert page.problems() == []
