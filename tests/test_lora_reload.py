"""Another LoRA or strength on the same pipeline: the transformer alone is read anew, and never two at a time."""

import gc
import weakref
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from streamblocks.checkpoints.checkpoint_files import CheckpointError
from streamblocks.checkpoints.lora_choice import LoraChoice
from streamblocks.stream.materialise import materialise, release_materialised
from streamblocks.stream.pipelines import BuiltInPipeline
from streamblocks.stream.recipe import Recipe

pytestmark = pytest.mark.usefixtures("no_pipeline")


@pytest.fixture
def lora(tmp_path, tiny_folder):
    width = load_file(tiny_folder / "transformer" / "diffusion_pytorch_model.safetensors")["blocks.0.attn1.to_q.weight"]
    generator = torch.Generator().manual_seed(0)
    layer, rows = "diffusion_model.blocks.0.self_attn.q", width.shape[0]
    pair = {
        f"{layer}.lora_down.weight": torch.randn(2, width.shape[1], generator=generator),
        f"{layer}.lora_up.weight": torch.randn(rows, 2, generator=generator),
    }
    save_file(pair, tmp_path / "lora.safetensors")
    return str(tmp_path / "lora.safetensors")


def _fill(pipeline):
    for name in ("text_encoder", "vae", "transformer"):
        pipeline._load(name)
    return pipeline.pipe.transformer.blocks[0].attn1.to_qkv.weight.clone()


def test_only_the_transformer_is_read_anew(tiny_folder, lora, tmp_path):
    recipe = Recipe(model=str(tiny_folder))
    pipeline = materialise(recipe)
    assert isinstance(pipeline, BuiltInPipeline)
    plain = _fill(pipeline)
    vae, text_encoder = pipeline.pipe.vae, pipeline.pipe.text_encoder
    old = weakref.ref(pipeline.pipe.transformer)
    whole = replace(recipe, loras=(LoraChoice(lora, 1.0),))
    assert materialise(whole) is pipeline and pipeline.recipe == whole
    gc.collect()
    assert old() is None and pipeline.transformer_bytes() > 0
    changed = _fill(pipeline)
    assert (pipeline.pipe.vae, pipeline.pipe.text_encoder) == (vae, text_encoder)
    assert pipeline.describe()["loras"] == [
        {"file": "lora.safetensors", "strength": 1.0, "layers": 1, "names_left_out": 0}
    ]
    materialise(replace(recipe, loras=(LoraChoice(lora, 0.5),)))
    half = _fill(pipeline)
    assert not torch.equal(plain, changed)
    torch.testing.assert_close(half - plain, (changed - plain) / 2, rtol=1e-5, atol=1e-6)

    absent = replace(recipe, loras=(LoraChoice(str(tmp_path / "absent.safetensors")),))
    with pytest.raises(CheckpointError, match="absent"):
        materialise(absent)
    assert materialise(pipeline.recipe) is pipeline and pipeline.recipe.loras[0].strength == 0.5
    assert materialise(recipe) is pipeline
    assert torch.equal(_fill(pipeline), plain)
    release_materialised()
    assert torch.equal(_fill(materialise(whole)), changed)


def test_another_difference_makes_a_new_pipeline(tiny_folder, lora):
    recipe = Recipe(model=str(tiny_folder))
    pipeline = materialise(recipe)
    assert materialise(replace(recipe, loras=(LoraChoice(lora),), dtype="float16")) is not pipeline
