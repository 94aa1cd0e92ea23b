"""The pack in a real ComfyUI: it loads under any folder name, its examples open in the page and run.

Skipped where ComfyUI (`$COMFYUI_PATH`) or, for the page, Chromium and playwright are missing. With
`STREAMBLOCKS_WRITE_TWINS=1` the API-format twins in `api_workflows/` are written again from the page.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import av
import pytest

from streamblocks.tools.workflow_to_prompt import convert_workflow

from chromium_page import ComfyPage, why_no_chromium
from comfyui_server import ComfyUIError, ComfyUIServer

ROOT = Path(__file__).resolve().parent.parent
TWINS = ROOT / "tests/api_workflows"
SCREENSHOTS = ROOT / "output/screenshots"
SAVED = ROOT / "tests/saved_workflows"
# Of the sampler.
ADVANCED = {
    *("steps", "shift", "kv_policy", "context_frames", "sink_frames", "attention_bias", "fps", "cleanup"),
    *("keep_frames", "memory_timeline", "reset_compile", "frames_per_block", "timesteps", "first_block_timesteps"),
    *("memory_gb", "kv_format", "on_prompt_change", "keep_stream", "fit", "video_end", "save_every"),
}
WORKFLOWS = sorted((ROOT / "example_workflows").glob("*.json"))
VIDEO_SUFFIXES = {".mp4", ".webm"}

each_workflow = pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)


@pytest.fixture(scope="module")
def page(comfyui_server: ComfyUIServer) -> Iterator[ComfyPage]:
    reason = why_no_chromium()
    if reason is not None:
        pytest.skip(reason)
    with ComfyPage(comfyui_server.url) as opened:
        yield opened


def own_nodes(server: ComfyUIServer) -> dict[str, Any]:
    folders = {f"custom_nodes.{name}" for name in server.packs}
    return {name: info for name, info in server.object_info().items() if info["python_module"] in folders}


def twin_of(path: Path, prompt: dict[str, Any]) -> dict[str, Any]:
    twin = TWINS / path.name
    if os.environ.get("STREAMBLOCKS_WRITE_TWINS"):
        twin.parent.mkdir(exist_ok=True)
        twin.write_text(json.dumps(prompt, indent=2, ensure_ascii=False) + "\n")
    return dict(json.loads(twin.read_text()))


def decoded_frames(video: Path) -> int:
    with av.open(str(video)) as container:
        return sum(1 for _ in container.decode(video=0))


def test_the_pack_is_imported_under_an_odd_folder_name(comfyui_server: ComfyUIServer) -> None:
    assert "IMPORT FAILED" not in comfyui_server.log_text(), comfyui_server.log_tail()
    nodes = own_nodes(comfyui_server)
    assert {"StreamBlocksLoadPipeline", "StreamBlocksSampler", "StreamBlocksSaveStream"} <= set(nodes)
    assert all(name.startswith("StreamBlocks") for name in nodes)


def test_the_page_starts_without_errors(page: ComfyPage) -> None:
    assert page.problems() == []


@each_workflow
def test_the_page_opens_it_and_sends_what_we_would(path: Path, page: ComfyPage, comfyui_server: ComfyUIServer) -> None:
    workflow = json.loads(path.read_text())
    page.load_workflow(path)
    page.fit()
    page.screenshot(SCREENSHOTS / f"{path.stem}.png")
    assert page.unknown_nodes() == []
    assert page.problems() == []
    sent = page.graph_to_prompt()
    assert convert_workflow(workflow, comfyui_server.object_info()) == sent
    assert twin_of(path, sent) == sent


@each_workflow
def test_it_runs_and_its_video_decodes(path: Path, comfyui_server: ComfyUIServer) -> None:
    workflow = json.loads(path.read_text())
    prompt = convert_workflow(workflow, comfyui_server.object_info())
    for node in prompt.values():
        if node["class_type"] == "StreamBlocksSampler" and "track" not in node["inputs"]:
            node["inputs"]["blocks"] = 2
    if path.stem == "single_files":
        # The twins compute as they come, but the models that they stand for make larger and longer videos.
        sampler = next(node for node in prompt.values() if node["class_type"] == "StreamBlocksSampler")
        assert (sampler["inputs"]["width"], sampler["inputs"]["preset"]) == (0, "from the model")
        sampler["inputs"] |= {"width": 32, "height": 32}
    entry = comfyui_server.run(prompt, workflow)
    videos = [file for file in comfyui_server.output_files(entry) if file.suffix in VIDEO_SUFFIXES]
    assert videos, f"no video among the outputs: {entry['outputs']}"
    assert all(decoded_frames(video) > 0 for video in videos)


def test_a_workflow_saved_before_presets_means_what_it_meant(comfyui_server: ComfyUIServer, page: ComfyPage) -> None:
    path = ROOT / "tests/data/workflows/before_presets.json"
    page.load_workflow(path)
    assert page.unknown_nodes() == [] and page.problems() == []
    prompt = page.graph_to_prompt()
    sampler = next(node["inputs"] for node in prompt.values() if node["class_type"] == "StreamBlocksSampler")
    assert (sampler["width"], sampler["steps"], sampler["kv_policy"]) == (64, 4, "recompute")
    assert (sampler["preset"], sampler["frames_per_block"], sampler["timesteps"]) == ("from the model", 0, "")
    (video,) = comfyui_server.output_files(comfyui_server.run(prompt))
    assert decoded_frames(video) == 9 + 4 * 12


@pytest.mark.parametrize("path", sorted(SAVED.glob("ui/*.json")), ids=lambda path: path.stem)
def test_a_workflow_saved_before_tracks_and_pictures_means_what_it_meant(path: Path, page: ComfyPage) -> None:
    page.load_workflow(path)
    assert page.unknown_nodes() == [] and page.problems() == []
    before = json.loads((SAVED / "api" / path.name).read_text())
    for number, node in page.graph_to_prompt().items():
        then = before[number]["inputs"]
        assert {name: node["inputs"][name] for name in then} == then


@pytest.mark.parametrize("vue", [True, False], ids=["Vue", "classic"])
def test_advanced_inputs_are_folded_away_and_still_sent(vue: bool, page: ComfyPage) -> None:
    sampler = "app.graph.nodes.find(n => n.type === 'StreamBlocksSampler')"
    shown = f"() => {sampler}.widgets.filter(w => !w.hidden).map(w => w.name)"
    setting = "async value => { await app.extensionManager.setting.set('Comfy.VueNodes.Enabled', value) }"
    try:
        page.evaluate(setting, vue)
        page.load_workflow(ROOT / "example_workflows/text_to_video_stream.json")
        page.fit()
        page.screenshot(SCREENSHOTS / f"folded_{'vue' if vue else 'classic'}.png")
        sent, folded = page.graph_to_prompt(), page.evaluate(shown)
        # Vue nodes fold by the page's own rule, and have the page's own button.
        assert page.page.locator('[data-testid="advanced-inputs-button"]').count() == (2 if vue else 0)
        assert page.page.get_by_text("preset", exact=True).count() == int(vue)
        assert page.page.get_by_text("kv_policy", exact=True).count() == 0
        page.evaluate(f"() => {sampler}.toggleAdvanced()")
        assert set(page.evaluate(shown)) - set(folded) == ADVANCED
        assert page.graph_to_prompt() == sent and set(sent["2"]["inputs"]) >= ADVANCED
        assert page.problems() == []
    finally:
        page.evaluate(setting, False)


def decoded(video: Path) -> list[bytes]:
    with av.open(str(video)) as container:
        return [frame.to_ndarray(format="rgb24").tobytes() for frame in container.decode(video=0)]


def test_stock_nodes_take_the_video(comfyui_server: ComfyUIServer) -> None:
    path = ROOT / "example_workflows/text_to_video_stream.json"
    prompt = convert_workflow(json.loads(path.read_text()), comfyui_server.object_info())
    sampler_id = next(key for key, node in prompt.items() if node["class_type"] == "StreamBlocksSampler")
    prompt[sampler_id]["inputs"] |= {"blocks": 2, "width": 64, "height": 64, "steps": 1, "keep_frames": "all"}
    prompt["parts"] = {"class_type": "GetVideoComponents", "inputs": {"video": [sampler_id, 0]}}
    prompt["frames"] = {"class_type": "PreviewImage", "inputs": {"images": ["parts", 0]}}
    prompt["kept"] = {"class_type": "PreviewImage", "inputs": {"images": [sampler_id, 1]}}
    prompt["saved"] = {
        "class_type": "SaveVideo",
        "inputs": {"video": [sampler_id, 0], "filename_prefix": "stock", "format": "mp4", "format.codec": "auto"},
    }
    outputs = comfyui_server.run(prompt)["outputs"]
    assert len(outputs["frames"]["images"]) == len(outputs["kept"]["images"]) == 21
    assert decoded_frames(comfyui_server.base / "output" / outputs["saved"]["images"][0]["filename"]) == 21


def cancel_after_a_block(server: ComfyUIServer, prompt: dict[str, Any]) -> Path:
    """Queue a long stream, cancel it when its first block is on the disk; the file that is left."""
    before = set(server.base.glob("temp/streamblocks_*.mp4"))
    unfinished = server.base / "output/streamblocks/unfinished"
    saved_before = set(unfinished.glob("*/block_*.safetensors"))
    kept_before = set(unfinished.glob("*.mp4"))
    endless = server.queue(prompt)
    deadline = time.monotonic() + 120
    while not (set(unfinished.glob("*/block_*.safetensors")) - saved_before):
        assert time.monotonic() < deadline, "no block was saved"
        time.sleep(0.1)
    server.interrupt()
    with pytest.raises(ComfyUIError, match="interrupted at StreamBlocksSampler"):
        server.wait(endless, timeout=30)
    assert set(server.base.glob("temp/streamblocks_*.mp4")) == before
    (kept,) = set(unfinished.glob("*.mp4")) - kept_before
    return kept


def test_cancel_twice_then_a_new_run(comfyui_server: ComfyUIServer) -> None:
    path = ROOT / "example_workflows/text_to_video_stream.json"
    prompt = convert_workflow(json.loads(path.read_text()), comfyui_server.object_info())
    sampler = next(node["inputs"] for node in prompt.values() if node["class_type"] == "StreamBlocksSampler")
    sampler |= {"blocks": 2, "width": 64, "height": 64, "steps": 1}
    (first,) = comfyui_server.output_files(comfyui_server.run(prompt))
    for _ in range(2):
        sampler["blocks"] = 1000
        kept = decoded(cancel_after_a_block(comfyui_server, prompt))
        assert len(kept) % 12 == 9
        # The encoder sees the same pictures, whatever comes after them.
        assert kept[:9] == decoded(first)[:9]
        assert "pictures made so far are in" in comfyui_server.log_text()
    # Another clean-up policy makes the same pictures, and keeps ComfyUI from answering out of its cache.
    sampler |= {"blocks": 2, "cleanup": "never"}
    (again,) = comfyui_server.output_files(comfyui_server.run(prompt))
    assert again != first
    assert decoded(again) == decoded(first)


def test_a_linked_model_is_not_computed_again_each_run(comfyui_server: ComfyUIServer) -> None:
    path = ROOT / "example_workflows/text_to_video_stream.json"
    prompt = convert_workflow(json.loads(path.read_text()), comfyui_server.object_info())
    by_class = {node["class_type"]: key for key, node in prompt.items()}
    loader, sampler = by_class["StreamBlocksLoadPipeline"], by_class["StreamBlocksSampler"]
    prompt[sampler]["inputs"] |= {"blocks": 1, "width": 64, "height": 64, "steps": 1}
    for name in ("model", "components"):
        prompt[f"{name} text"] = {"class_type": "PrimitiveString", "inputs": {"value": prompt[loader]["inputs"][name]}}
        through = {"anything": [f"{name} text", 0], "drop_pipeline": False}
        through |= {"unload_models": False, "clear_compile_caches": False}
        prompt[f"{name} link"] = {"class_type": "StreamBlocksFreeMemory", "inputs": through}
        prompt[loader]["inputs"][name] = [f"{name} link", 0]
    comfyui_server.run(prompt)
    messages = dict(comfyui_server.run(prompt)["status"]["messages"])
    assert {loader, sampler} <= set(messages["execution_cached"]["nodes"])


def test_a_failing_node_is_reported_with_its_own_words(comfyui_server: ComfyUIServer) -> None:
    prompt = {"1": {"class_type": "StreamBlocksNoSuchNode", "inputs": {}}}
    with pytest.raises(ComfyUIError, match="StreamBlocksNoSuchNode"):
        comfyui_server.run(prompt)
