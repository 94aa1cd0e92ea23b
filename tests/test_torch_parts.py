"""VAE, text encoder and LoRA as `torch.save` wrote them: the same tensors as from their safetensors twins."""

import pytest
import torch
from layouts import UMT5, UMT5_WAN_NAMES, VAE, VAE_22
from safetensors.torch import load_file

from streamblocks.checkpoints.lora_choice import LoraChoice
from streamblocks.wan.checkpoints.components import transformer_component
from streamblocks.wan.checkpoints.tokenizer import find_tokenizer

from wan_loading import component_of

LAYOUTS = VAE.parent


def resaved(path, folder, suffix):
    """A twin of a safetensors file, as the makers of Wan publish theirs."""
    target = folder / f"{path.stem}{suffix}"
    torch.save(load_file(path), target)
    return target


def same(ours, theirs):
    expected = theirs.state_dict()
    actual = ours.state_dict()
    return actual.keys() == expected.keys() and all(torch.equal(actual[name], expected[name]) for name in expected)


@pytest.mark.parametrize(
    ("name", "path", "suffix"),
    [
        ("vae", VAE, ".pth"),
        ("vae", VAE_22, ".pth"),
        ("text_encoder", UMT5, ".pt"),
        ("text_encoder", UMT5_WAN_NAMES, ".pth"),
    ],
    ids=["vae", "vae of 2.2", "umt5", "umt5 in Wan's names"],
)
def test_a_part_loads_as_its_twin(tmp_path, name, path, suffix):
    twin = component_of(path, name, torch.float32).load("cpu")
    assert same(component_of(resaved(path, tmp_path, suffix), name, torch.float32).load("cpu"), twin)


def test_the_tokenizer_inside_is_found(tmp_path):
    prompt = "a red fox"
    assert (
        find_tokenizer([resaved(UMT5, tmp_path, ".pt")])(prompt).input_ids == find_tokenizer([UMT5])(prompt).input_ids
    )


def test_a_lora_merges_as_its_twin(tmp_path):
    twin = LAYOUTS / "lora_peft.safetensors"
    plain, pickled = (
        transformer_component(
            LAYOUTS / "causal_wan.safetensors", dtype=torch.float32, loras=[LoraChoice(str(path), 0.6)]
        ).load("cpu")
        for path in (twin, resaved(twin, tmp_path, ".pt"))
    )
    assert same(pickled, plain)
