"""Build `example_workflows/` in the real page, so that each file and picture is what the page itself shows.

python tests/build_example_workflows.py

Run this after a node's inputs have changed, with the names of some examples or for all; `test_real_comfyui.py` then
compares, and writes the API twins with `STREAMBLOCKS_WRITE_TWINS=1`. A thumbnail shows pictures of the video that the
page's own prompt makes; the example whose published files are not here shows its graph.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import uuid
from pathlib import Path
from typing import Any

from example_graphs import EXAMPLE_GRAPHS, FROM_PUBLISHED_FILES
from example_thumbnails import write_thumbnail
from layouts import users_files
from PIL import Image

from chromium_page import ComfyPage
from comfyui_server import ComfyUIServer

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = ROOT / "example_workflows"

BUILD = """
async ([nodes, wires]) => {
  const graph = window.app.graph
  graph.clear()
  // The page remembers widgets by graph, node and name: a new node would take up the values of an old one's number.
  graph.id = crypto.randomUUID()
  const made = nodes.map(([type, pos, width, widgets, title, height]) => {
    const node = window.LiteGraph.createNode(type)
    if (!node) throw new Error(`no node class ${type}`)
    graph.add(node)
    node.pos = pos
    if (title) node.title = title
    for (const [name, value] of Object.entries(widgets)) {
      const widget = node.widgets.find(w => w.name === name)
      if (!widget) throw new Error(`${type} has no widget ${name}: ${node.widgets.map(w => w.name)}`)
      widget.value = value
    }
    node.setSize([width, height || node.computeSize()[1]])
    return node
  })
  const slot = (slots, name, node) => {
    const found = slots.findIndex(s => s.name.toLowerCase() === name || s.type.toLowerCase() === name)
    if (found < 0) throw new Error(`${node.type} has no slot ${name}: ${slots.map(s => s.name)}`)
    return found
  }
  for (const [from, output, to, input] of wires) {
    const [source, target] = [made[from], made[to]]
    source.connect(slot(source.outputs, output, source), target, slot(target.inputs, input, target))
  }
  await new Promise(done => setTimeout(done, 500))
  graph.setDirtyCanvas(true, true)
}
"""


# Where the nodes are on the page, in pixels, with a margin: left, top, right, bottom.
PLACE = """
() => {
  const { scale, offset } = app.canvas.ds
  const canvas = app.canvas.canvas.getBoundingClientRect()
  const boxes = app.graph.nodes.map(n => [n.pos[0], n.pos[1] - 30, n.pos[0] + n.size[0], n.pos[1] + n.size[1]])
  const edge = (side, pick) => (pick(...boxes.map(box => box[side])) + offset[side % 2]) * scale
  const margin = 24
  return [
    canvas.left + edge(0, Math.min) - margin, canvas.top + edge(1, Math.min) - margin,
    canvas.left + edge(2, Math.max) + margin, canvas.top + edge(3, Math.max) + margin,
  ]
}
"""
# Widths of the pictures, in pixels: of the templates' thumbnails, and of the README's.
THUMBNAIL, LARGE = 640, 1240
README_PICTURE = ROOT / "docs/graph.png"
IN_README = "text_to_video_stream"
SHOWN_AS_GRAPH = frozenset({IN_README, FROM_PUBLISHED_FILES})


def main() -> None:
    """Run as a script."""
    parser = argparse.ArgumentParser(description="Build the example workflows in ComfyUI's page.")
    parser.add_argument("names", nargs="*", default=[*EXAMPLE_GRAPHS], help="which ones (default: all)")
    names = parser.parse_args().names
    EXAMPLES.mkdir(exist_ok=True)
    with (
        tempfile.TemporaryDirectory() as base,
        ComfyUIServer(Path(base) / "comfyui", packs={"streamblocks": ROOT}, models=users_files(Path(base))) as server,
        ComfyPage(server.url, height=1000) as page,
    ):
        for name in names:
            _build(name, page, server, Path(base) / "page.png")


def _build(name: str, page: ComfyPage, server: ComfyUIServer, screenshot: Path) -> None:
    graph = EXAMPLE_GRAPHS[name]
    page.evaluate(BUILD, [graph.nodes, graph.wires])
    target = EXAMPLES / f"{name}.json"
    # The page saves an id of zeros for a graph it has never saved; two such files would be one workflow.
    workflow = _tidy(page.workflow()) | {"id": str(uuid.uuid5(uuid.NAMESPACE_URL, f"streamblocks/{name}"))}
    target.write_text(json.dumps(workflow, indent=2, ensure_ascii=False) + "\n")
    if name in SHOWN_AS_GRAPH:
        picture = _picture(page, screenshot)
    if name == FROM_PUBLISHED_FILES:
        _shrink(picture, THUMBNAIL).convert("RGB").save(target.with_suffix(".jpg"), quality=85)
    else:
        entry = server.run(page.graph_to_prompt(), workflow)
        write_thumbnail(server.output_files(entry), target.with_suffix(".jpg"), width=THUMBNAIL)
    if name == IN_README:
        _shrink(picture, LARGE).convert("P", palette=Image.Palette.ADAPTIVE).save(README_PICTURE, optimize=True)
    print(target)


def _picture(page: ComfyPage, screenshot: Path) -> Image.Image:
    """The nodes as the page shows them."""
    page.fit()
    page.screenshot(screenshot)
    with Image.open(screenshot) as whole:
        left, top, right, bottom = page.evaluate(PLACE)
        return whole.crop((max(0, left), max(0, top), min(whole.width, right), min(whole.height, bottom)))


def _shrink(picture: Image.Image, width: int) -> Image.Image:
    size = (min(width, picture.width), round(picture.height * min(1.0, width / picture.width)))
    return picture.resize(size, Image.Resampling.LANCZOS)


def _tidy(value: Any) -> Any:
    """The workflow without the nulls that only say that something has not been set."""
    if isinstance(value, dict):
        return {key: _tidy(item) for key, item in value.items() if item is not None or key in ("link", "links")}
    if isinstance(value, list):
        return [_tidy(item) for item in value]
    return value


if __name__ == "__main__":
    main()
