"""Single files and stock text nodes in a real ComfyUI, laid out under `models/` as its users have them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.modular_pipelines.wan.encoders import get_t5_prompt_embeds
from file_streams import FILES, SHORT, stream
from layouts import LAYOUTS, TRANSFORMER, UMT5, VAE, relative_error, umt5_values
from PIL import Image

from streamblocks.stream.convert import convert_checkpoint
from streamblocks.stream.recipe import Recipe
from streamblocks.wan.checkpoints.tokenizer import find_tokenizer

from comfyui_server import ComfyUIError, ComfyUIServer, comfyui_found
from wan_loading import load_text_encoder

PACK_ROOT = Path(__file__).resolve().parent.parent
PROMPT = umt5_values()[0][0]

# ComfyUI takes a text encoder of Wan for the real one by its 24 layers, and its sizes from a table. The twin's are told
# here; everything else is the stock nodes' own.
TWIN_SIZES = f"""
import json
import os
import comfy.sd
import comfy.text_encoders.wan as wan
import folder_paths
import torch

SIZES = json.loads({(LAYOUTS / "umt5_config.json").read_text()!r})

class TwinModel(wan.UMT5XXlModel):
    def __init__(self, *args, model_options={{}}, **options):
        super().__init__(*args, model_options={{**model_options, "umt5xxl_model_config": SIZES}}, **options)

wan.UMT5XXlModel = TwinModel
comfy.sd.detect_te_model = lambda weights: comfy.sd.TEModel.T5_XXL

class SaveEmbeddings:
    RETURN_TYPES, FUNCTION, OUTPUT_NODE, CATEGORY = (), "save", True, "tests"

    @classmethod
    def INPUT_TYPES(cls):
        return {{"required": {{"conditioning": ("CONDITIONING",)}}}}

    def save(self, conditioning):
        torch.save(conditioning[0][0], os.path.join(folder_paths.get_output_directory(), "embeddings.pt"))
        return {{}}

NODE_CLASS_MAPPINGS = {{"SaveEmbeddings": SaveEmbeddings}}
"""


NESTED, CACHED = "diffusers/wan/tiny", "diffusers/owner/parts"


def lay_out_drive(drive: Path, tiny: Path) -> Path:
    """A second place for models: a transformer in a nested folder, the rest in a hub cache. Returns its config file."""
    snapshot = drive / "diffusers/models--owner--parts/snapshots/1234"
    for part in tiny.iterdir():
        folder = drive / NESTED if part.name == "transformer" else snapshot
        if part.is_dir():
            folder.mkdir(parents=True, exist_ok=True)
            (folder / part.name).symlink_to(part, target_is_directory=True)
    # The same name as in the first place, which is taken.
    (drive / "vae/wan").mkdir(parents=True)
    (drive / "vae/wan/wan_2.1_vae.safetensors").write_text("not a VAE")
    config = drive / "extra_model_paths.yaml"
    config.write_text(f"drive:\n  base_path: {drive}\n  diffusers: diffusers\n  vae: vae\n")
    return config


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> Iterator[ComfyUIServer]:
    if not comfyui_found():
        pytest.skip("real ComfyUI not found: set COMFYUI_PATH")
    drive = lay_out_drive(tmp_path_factory.mktemp("drive"), tiny_folder)
    extra = ("--fp32-text-enc", "--extra-model-paths-config", str(drive))
    sizes = tmp_path_factory.mktemp("packs") / "twin_sizes"
    sizes.mkdir()
    (sizes / "__init__.py").write_text(TWIN_SIZES)
    # With the sizes in its header that ComfyUI cannot read off the shapes, for the stock loader.
    plain = tmp_path_factory.mktemp("plain") / "plain_wan.safetensors"
    convert_checkpoint(TRANSFORMER, plain, on_progress=lambda *_: None)
    models = {
        "diffusion_models/plain_wan.safetensors": plain,
        "loras/lora_peft.safetensors": LAYOUTS / "lora_peft.safetensors",
        "diffusion_models/causal_wan.safetensors": TRANSFORMER,
        "vae/wan/wan_2.1_vae.safetensors": VAE,
        # ComfyUI counts this folder to models/text_encoders.
        "clip/umt5.safetensors": UMT5,
    }
    packs = {"streamblocks": PACK_ROOT, "twin_sizes": sizes}
    with ComfyUIServer(tmp_path_factory.mktemp("comfyui"), packs, models, extra_args=extra) as started:
        yield started


def defaults(info: dict[str, Any]) -> dict[str, Any]:
    """The inputs of a node that was just dropped on the page."""
    sections = info["input"].get("required", {}), info["input"].get("optional", {})
    inputs: dict[str, Any] = {}
    for section in sections:
        for name, (_, *options) in section.items():
            if options and "default" in options[0]:
                inputs[name] = options[0]["default"]
    return inputs


def prompt_for(server: ComfyUIServer, **loader: str) -> dict[str, Any]:
    info = server.object_info()
    load = defaults(info["StreamBlocksLoadPipeline"]) | {
        "model": "diffusion_models/causal_wan.safetensors",
        "vae": "vae/wan/wan_2.1_vae.safetensors",
        "dtype": "float32",
    }
    sample = defaults(info["StreamBlocksSampler"]) | {"pipeline": ["load", 0], "prompt": PROMPT, "keep_frames": "all"}
    sample |= {"blocks": 2, "width": 32, "height": 32, "steps": 2, "seed": 3}
    return {
        "load": {"class_type": "StreamBlocksLoadPipeline", "inputs": load | loader},
        "sample": {"class_type": "StreamBlocksSampler", "inputs": sample},
        "show": {"class_type": "PreviewImage", "inputs": {"images": ["sample", 1]}},
        "told": {"class_type": "PreviewAny", "inputs": {"source": ["sample", 2]}},
    }


def pictures(server: ComfyUIServer, prompt: dict[str, Any]) -> tuple[np.ndarray, dict[str, Any]]:
    entry = server.run(prompt)
    images = [np.asarray(Image.open(path).convert("RGB")) for path in server.output_files(entry)]
    return np.stack(images).astype(int), json.loads(entry["outputs"]["told"]["text"][0])


def test_files_are_listed_and_make_a_stream_that_stock_text_nodes_make_too(server: ComfyUIServer) -> None:
    ours, told = pictures(server, prompt_for(server, text_encoder="text_encoders/umt5.safetensors"))
    assert ours.shape == (21, 32, 32, 3) and ours.std() > 5
    assert told["prompt"] == PROMPT and not told["embeds_given"]

    stock = prompt_for(server)
    stock["clip"] = {"class_type": "CLIPLoader", "inputs": {"clip_name": "umt5.safetensors", "type": "wan"}}
    stock["text"] = {"class_type": "CLIPTextEncode", "inputs": {"clip": ["clip", 0], "text": PROMPT}}
    stock["sample"]["inputs"] |= {"conditioning": ["text", 0], "prompt": "not this one"}
    theirs, told = pictures(server, stock)
    assert told["embeds_given"] and told["prompt"] == "(from the conditioning)"
    assert np.abs(ours - theirs).max() <= 1

    stock["text"]["inputs"]["text"] = "something else"
    assert np.abs(pictures(server, stock)[0] - theirs).max() > 1


def test_without_a_text_encoder_it_is_said_what_to_do(server: ComfyUIServer) -> None:
    with pytest.raises(ComfyUIError, match=r"has no text encoder: choose one .* or connect a conditioning"):
        server.run(prompt_for(server))


def test_only_listed_files_are_taken(server: ComfyUIServer) -> None:
    with pytest.raises(ComfyUIError, match=r"value_not_in_list"):
        server.run(prompt_for(server, vae="vae/../vae/wan/wan_2.1_vae.safetensors"))


def test_folders_of_extra_model_paths_are_listed_and_run(server: ComfyUIServer) -> None:
    inputs = server.object_info()["StreamBlocksLoadPipeline"]["input"]
    models, components = (inputs["required"][name][1]["options"] for name in ("model", "components"))
    assert NESTED in models and NESTED in components
    assert CACHED not in models and CACHED in components
    assert inputs["optional"]["vae"][1]["options"].count("vae/wan/wan_2.1_vae.safetensors") == 1

    prompt = prompt_for(server, model=NESTED, components=CACHED, vae="from the components")
    prompt["sample"]["inputs"] |= {"blocks": 1}
    assert pictures(server, prompt)[0].shape == (9, 32, 32, 3)


STOCK: dict[str, Any] = {
    "model": {
        "class_type": "UNETLoader",
        "inputs": {"unet_name": "plain_wan.safetensors", "weight_dtype": "default"},
    },
    "clip": {"class_type": "CLIPLoader", "inputs": {"clip_name": "umt5.safetensors", "type": "wan"}},
    "vae": {"class_type": "VAELoader", "inputs": {"vae_name": "wan/wan_2.1_vae.safetensors"}},
}


def test_stock_text_nodes_and_ours_give_the_same_embeddings(server: ComfyUIServer) -> None:
    encoder, tokenizer = load_text_encoder(UMT5, device="cpu", dtype=torch.float32), find_tokenizer([UMT5])
    for text in umt5_values()[0]:
        encode = {"class_type": "CLIPTextEncode", "inputs": {"clip": ["clip", 0], "text": text}}
        save = {"class_type": "SaveEmbeddings", "inputs": {"conditioning": ["text", 0]}}
        server.run({"clip": STOCK["clip"], "text": encode, "save": save})
        theirs = torch.load(server.base / "output/embeddings.pt", weights_only=True)
        ours = get_t5_prompt_embeds(encoder, tokenizer, text, 512, torch.device("cpu"))
        assert theirs.shape == ours.shape == (1, 512, 64)
        assert relative_error(ours, theirs) <= 1e-5


def test_a_lora_changes_the_pictures_as_strongly_as_it_is_told(server: ComfyUIServer) -> None:
    prompt = prompt_for(server, text_encoder="text_encoders/umt5.safetensors")
    prompt["sample"]["inputs"]["blocks"] = 1
    plain, told = pictures(server, prompt)
    assert told["loras"] == []
    lora = {"pipeline": ["load", 0], "lora": "lora_peft.safetensors", "strength": 1.0}
    prompt["lora"] = {"class_type": "StreamBlocksLora", "inputs": lora}
    prompt["sample"]["inputs"]["pipeline"] = ["lora", 0]
    changed, told = pictures(server, prompt)
    assert np.abs(changed - plain).max() > 1
    [match] = told["loras"]
    assert (match["file"], match["strength"], match["names_left_out"]) == ("lora_peft.safetensors", 1.0, 0)
    assert match["layers"] > 0 and told["notices"] == []
    lora["strength"] = 0.0
    unchanged, told = pictures(server, prompt)
    assert np.array_equal(unchanged, plain) and told["loras"] == [match | {"strength": 0.0}]


def test_what_comfyui_saves_makes_the_same_stream(server: ComfyUIServer) -> None:
    parts = {"model": ["model", 0], "clip": ["clip", 0], "vae": ["vae", 0]}
    saved = {
        "all": {"class_type": "CheckpointSave", "inputs": parts | {"filename_prefix": "checkpoints/all"}},
        "text": {"class_type": "CLIPSave", "inputs": {"clip": parts["clip"], "filename_prefix": "clip/text"}},
        "pictures": {"class_type": "VAESave", "inputs": {"vae": parts["vae"], "filename_prefix": "vae/vae"}},
    }
    server.run(STOCK | saved)
    output = server.base / "output"
    all_in_one = output / "checkpoints/all_00001_.safetensors"
    text, tokenizer = output / "clip/text_umt5xxl_00001_.safetensors", output / "clip/text_00001_.safetensors"
    alone = Recipe(
        str(TRANSFORMER),
        vae=str(output / "vae/vae_00001_.safetensors"),
        text_encoder=str(text),
        tokenizer=str(tokenizer),
        dtype="float32",
    )
    expected = stream(FILES, settings=SHORT)[0]
    assert torch.equal(stream(Recipe(str(all_in_one), dtype="float32"), settings=SHORT)[0], expected)
    assert torch.equal(stream(alone, settings=SHORT)[0], expected)
