"""Build `example_workflows/` in the real page, so that each file and picture is what the page itself shows.

python tests/build_example_workflows.py

Run this after a node's inputs have changed; `test_real_comfyui.py` then compares, and writes the API twins
with `STREAMBLOCKS_WRITE_TWINS=1`.
"""

from __future__ import annotations

import json
import tempfile
import uuid
from pathlib import Path
from typing import Any

from layouts import users_files
from PIL import Image

from chromium_page import ComfyPage
from comfyui_server import ComfyUIServer

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = ROOT / "example_workflows"

# A node: its class, its place, its width, and the widgets that differ from the schema's default.
Node = tuple[str, tuple[int, int], int, dict[str, Any]]
# A wire: from node and output, to node and input; nodes by their number below, slots by name.
Wire = tuple[int, str, int, str]

# Seconds on a CPU with the mini model that comes with the pack, and the same video each time. Sizes, steps and the like
# come from the model.
SMALL_AND_SHORT = {
    "prompt": "a red circle moves right",
    # One in which shapes move through the middle of the picture.
    "seed": 6,
    "control_after_generate": "fixed",
    "blocks": 5,
}
# Files as ComfyUI's users have them; the test lays their twins out.
SINGLE_FILES = {
    "model": "diffusion_models/self_forcing_dmd.pt",
    "vae": "vae/wan_2.1_vae.safetensors",
    "text_encoder": "text_encoders/umt5_xxl_fp8_e4m3fn_scaled.safetensors",
}
FOX = "a red fox runs through fresh snow, morning light, handheld camera, its breath visible in the cold air"

TEXT_TO_VIDEO: tuple[list[Node], list[Wire]] = (
    [
        ("StreamBlocksLoadPipeline", (60, 120), 340, {}),
        ("StreamBlocksSampler", (460, 120), 420, SMALL_AND_SHORT),
        ("StreamBlocksSaveStream", (940, 120), 420, {}),
    ],
    [(0, "pipeline", 1, "pipeline"), (1, "video", 2, "video")],
)
QUANTIZED: tuple[list[Node], list[Wire]] = (
    [
        ("StreamBlocksLoadPipeline", (60, 120), 340, {}),
        ("StreamBlocksQuantizePipeline", (440, 120), 340, {}),
        ("StreamBlocksSampler", (820, 120), 420, SMALL_AND_SHORT),
        ("StreamBlocksSaveStream", (1280, 120), 420, {}),
    ],
    [(0, "pipeline", 1, "pipeline"), (1, "pipeline", 2, "pipeline"), (2, "video", 3, "video")],
)
FROM_SINGLE_FILES: tuple[list[Node], list[Wire]] = (
    [
        ("StreamBlocksLoadPipeline", (60, 120), 420, SINGLE_FILES),
        ("StreamBlocksSampler", (540, 120), 420, {"prompt": FOX}),
        ("StreamBlocksSaveStream", (1020, 120), 420, {}),
    ],
    [(0, "pipeline", 1, "pipeline"), (1, "video", 2, "video")],
)
WORKFLOWS = {
    "text_to_video_stream": TEXT_TO_VIDEO,
    "quantized_stream": QUANTIZED,
    "single_files": FROM_SINGLE_FILES,
}

BUILD = """
async ([nodes, wires]) => {
  const graph = window.app.graph
  graph.clear()
  const made = nodes.map(([type, pos, width, widgets]) => {
    const node = window.LiteGraph.createNode(type)
    if (!node) throw new Error(`no node class ${type}`)
    graph.add(node)
    node.pos = pos
    for (const [name, value] of Object.entries(widgets)) {
      const widget = node.widgets.find(w => w.name === name)
      if (!widget) throw new Error(`${type} has no widget ${name}: ${node.widgets.map(w => w.name)}`)
      widget.value = value
    }
    node.setSize([width, node.computeSize()[1]])
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


def main() -> None:
    """Run as a script."""
    EXAMPLES.mkdir(exist_ok=True)
    with (
        tempfile.TemporaryDirectory() as base,
        ComfyUIServer(Path(base) / "comfyui", packs={"streamblocks": ROOT}, models=users_files(Path(base))) as server,
        ComfyPage(server.url, height=1000) as page,
    ):
        for name, (nodes, wires) in WORKFLOWS.items():
            page.evaluate(BUILD, [nodes, wires])
            target = EXAMPLES / f"{name}.json"
            # The page saves an id of zeros for a graph it has never saved; two such files would be one workflow.
            workflow = _tidy(page.workflow()) | {"id": str(uuid.uuid5(uuid.NAMESPACE_URL, f"streamblocks/{name}"))}
            target.write_text(json.dumps(workflow, indent=2, ensure_ascii=False) + "\n")
            picture = _picture(page, Path(base) / "page.png")
            _shrink(picture, THUMBNAIL).convert("RGB").save(target.with_suffix(".jpg"), quality=85)
            if name == "text_to_video_stream":
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
