"""What the page shows of the pack's nodes while its language is Chinese."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chromium_page import ComfyPage
from comfyui_server import ComfyUIServer
from embedded_program import NODES

if TYPE_CHECKING:
    from playwright.sync_api import Route

EXAMPLE = Path(__file__).resolve().parent.parent / "example_workflows/video_to_video.json"
_COLUMNS = 8
_LOCALE = "/settings/Comfy.Locale"
_UNFOLD = """() => {
  const ours = app.graph.nodes.filter(node => node.type.startsWith('StreamBlocks'))
  for (const node of ours) if (!node.showAdvanced) node.toggleAdvanced()
}"""
_CHOOSE = """type => {
  const node = app.graph.nodes.find(node => node.type === type)
  app.canvas.centerOnNode(node)
  app.canvas.selectNode(node)
  app.canvas.setDirty(true, true)
  return node.id
}"""
# What a canvas draws is in no document; choices are shown when somebody opens their list.
_OF_NODES = """() => app.graph.nodes.flatMap(node => {
  if (node.type.endsWith('Note')) return [node.title, ...node.widgets.map(widget => widget.value)]
  if (!node.type.startsWith('StreamBlocks')) return [node.title]
  const own = (node.widgets ?? []).filter(widget => widget.name !== 'control_after_generate')
  const label = (widget, choice) => widget.options.getOptionLabel?.(choice) ?? choice
  const choices = own.flatMap(widget => (widget.options?.values ?? []).map(choice => label(widget, String(choice))))
  const shown = own.filter(widget => widget.type === 'combo').map(widget => String(widget._displayValue))
  const slots = [...node.inputs, ...node.outputs].map(slot => slot.label || slot.localized_name || slot.name)
  const names = own.filter(widget => !widget.element).map(widget => widget.label || widget.name)
  const boxes = own.map(widget => widget.element?.placeholder ?? '')
  return [node.title, ...slots, ...names, ...boxes, ...[...choices, ...shown].filter(text => !text.includes('/'))]
})"""
# Of elements: Vue nodes, and what lies over the canvas. A choice with a slash is a file, as above.
_OF_ELEMENTS = """() => {
  const texts = []
  const ours = app.graph.nodes.filter(node => node.type.startsWith('StreamBlocks')).map(node => String(node.id))
  const vue = [...document.querySelectorAll('[data-node-id]')].filter(element => ours.includes(element.dataset.nodeId))
  for (const root of [...vue, ...document.querySelectorAll('.dom-widget')]) {
    if (root.querySelector('.comfy-markdown')) continue
    const walker = document.createTreeWalker(root, NodeFilter.SHOW_TEXT)
    while (walker.nextNode()) texts.push(walker.currentNode.data)
    for (const element of root.querySelectorAll('[title]')) texts.push(element.title)
  }
  return texts.filter(text => !/^\\s*[\\w.-]+\\/[\\w./-]+\\s*$/.test(text))
}"""


@contextmanager
def page_in_chinese(server: ComfyUIServer) -> Iterator[ComfyPage]:
    """The page for a user who has chosen Chinese."""
    server.post(_LOCALE, "zh")
    try:
        with ComfyPage(server.url) as page:
            yield page
    finally:
        server.post(_LOCALE, "en")


def every_node() -> dict[str, Any]:
    """A workflow of an example, with its titles and its note, and of each other node of the pack; without wires."""
    nodes = json.loads(EXAMPLE.read_text())["nodes"]
    nodes += [{"type": name} for name in NODES if name not in {node["type"] for node in nodes}]
    for index, node in enumerate(nodes):
        node |= {"id": index + 1, "pos": [500 * (index % _COLUMNS), 1200 * (index // _COLUMNS)], "order": index}
        for slot in (*node.get("inputs", ()), *node.get("outputs", ())):
            slot.pop("link", None)
            slot.pop("links", None)
    return {"nodes": nodes, "links": [], "groups": [], "config": {}, "extra": {}, "version": 0.4}


def shown_texts(page: ComfyPage) -> list[str]:
    """All that the page shows of the pack's nodes in the graph, with nothing folded away."""
    page.evaluate(_UNFOLD)
    page.fit()
    return [text.strip() for text in (*page.evaluate(_OF_NODES), *page.evaluate(_OF_ELEMENTS))]


def tooltip(page: ComfyPage, node_type: str, label: str) -> str:
    """What a Vue node says of one of its inputs when the pointer rests on it."""
    number = page.evaluate(_CHOOSE, node_type)
    page.page.locator(f"[data-node-id='{number}']").get_by_text(label, exact=True).first.hover(force=True)
    shown = page.page.locator(".p-tooltip-text")
    shown.wait_for(timeout=10_000)
    return shown.inner_text()


def help_page(page: ComfyPage, node_type: str) -> str:
    """The text of a node's page, opened from the bar over the chosen node."""
    # The page cuts the folder's name at its first dot; packs in folders without one need no help.
    page.page.route("**/extensions/my-stream/docs/**", _to_the_folder)
    page.evaluate(_CHOOSE, node_type)
    page.page.get_by_test_id("info-button").click()
    content = page.page.locator(".node-help-content")
    content.get_by_role("heading").first.wait_for(timeout=10_000)
    return content.inner_text()


def _to_the_folder(route: Route) -> None:
    route.continue_(url=route.request.url.replace("/my-stream/", "/my-stream.pack.v2/"))
