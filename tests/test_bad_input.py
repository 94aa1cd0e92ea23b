"""Each file a user may choose, damaged or mistaken in each usual way: one sentence that names the file."""

import os
import re
from dataclasses import replace

import pytest
import torch
from file_streams import FILES, SHORT, stream
from layouts import LAYOUTS, TRANSFORMER, UMT5, UMT5_FP8, VAE
from safetensors.torch import load_file, save_file

from streamblocks.checkpoints.lora_choice import LoraChoice
from streamblocks.checkpoints.safetensors_reading import StoredTensor
from streamblocks.ops.quantization import QuantizationSpec

pytestmark = pytest.mark.usefixtures("no_pipeline")

LORA = LAYOUTS / "lora_peft.safetensors"
GOOD = {"model": TRANSFORMER, "vae": VAE, "text_encoder": UMT5, "lora": LORA}
# A tensor of each that is a matrix or more, and is used in every block.
TENSORS = {
    "model": "model.blocks.1.ffn.0.weight",
    "vae": "decoder.conv1.weight",
    "text_encoder": "encoder.block.1.layer.0.SelfAttention.q.weight",
    "lora": next(name for name in load_file(LORA) if name.endswith("lora_B.weight")),
}


def chosen(part, path):
    if part == "lora":
        return replace(FILES, loras=(LoraChoice(str(path)),))
    return replace(FILES, **{part: str(path)})


def say(recipe):
    """What the stream is refused with."""
    with pytest.raises((ValueError, RuntimeError)) as raised:
        stream(recipe, settings=SHORT)
    text = str(raised.value)
    assert "\n" not in text and text.endswith("."), text
    return text


def truncated(part, path):
    content = GOOD[part].read_bytes()
    path.write_bytes(content[: len(content) * 2 // 3])


def reshaped(part, path):
    state = load_file(GOOD[part])
    tensor = state[TENSORS[part]]
    save_file(state | {TENSORS[part]: tensor[: len(tensor) // 2].contiguous()}, path)


class Code:
    """Leaves a trace where it is unpickled."""

    def __init__(self, canary):
        self.canary = canary

    def __reduce__(self):
        return os.mkdir, (str(self.canary),)


def with_code(part, path):
    torch.save({"state_dict": load_file(GOOD[part]), "hook": Code(path.parent / "canary")}, path)


def page(part, path):
    path.write_bytes(b"<!DOCTYPE html>\n<html><head><title>Log in</title></head></html>" * 20)


def pointer(part, path):
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 1486912\n")


def gguf(part, path):
    path.write_bytes(b"GGUF\x03\x00\x00\x00" * 64)


def swapped(part, path):
    path.write_bytes((TRANSFORMER if part == "lora" else LORA).read_bytes())


KINDS = {
    "truncated": (truncated, r"is not a complete safetensors file .*: download it again"),
    "wrong shape": (reshaped, r"wrong shapes|has a wrong shape|belongs to a model of another size"),
    "code": (with_code, r"so it is not opened: give a \.safetensors file"),
    "web page": (page, r"is a web page and no checkpoint"),
    "git lfs": (pointer, r"is a Git LFS pointer.*git lfs pull"),
    "gguf": (gguf, r"is a GGUF file.*take the \.safetensors or \.pt file.*conditioning"),
    "lora or model": (swapped, r"holds a LoRA|holds no (LoRA|VAE|umt5)"),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("part", GOOD)
def test_a_bad_file_is_one_sentence_before_anything_is_read(tmp_path, monkeypatch, part, kind):
    write, says = KINDS[kind]
    path = tmp_path / ("model.pt" if kind == "code" else "model.safetensors")
    write(part, path)
    read = StoredTensor.chunks

    def chunks(self, device):
        assert "float" not in str(self.dtype), f"{self.key} was read"
        return read(self, device)

    monkeypatch.setattr(StoredTensor, "chunks", chunks)
    text = say(chosen(part, path))
    assert str(path) in text
    assert re.search(says, text), text
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
@pytest.mark.parametrize("part", GOOD)
def test_a_weight_that_is_not_finite_is_named(tmp_path, part, number):
    state = load_file(GOOD[part])
    state[TENSORS[part]].view(-1)[5] = number
    save_file(state, tmp_path / "model.safetensors")
    text = say(chosen(part, tmp_path / "model.safetensors"))
    assert f"{TENSORS[part]} in " in text and "model.safetensors holds " in text and "download the file again" in text


@pytest.mark.parametrize("format_", ["fp8", "int8"])
def test_one_that_is_to_be_quantized_is_named_while_it_is_read(tmp_path, format_):
    state = load_file(TRANSFORMER)
    state[TENSORS["model"]][3, 4] = float("nan")
    save_file(state, tmp_path / "model.safetensors")
    recipe = replace(chosen("model", tmp_path / "model.safetensors"), quantization=QuantizationSpec(format_, "per row"))
    text = say(recipe)
    assert "blocks.1.ffn.net.0.proj" in text and "holds inf or NaN" in text


def test_one_that_is_stored_in_eight_bits_is_named(tmp_path):
    state = load_file(UMT5_FP8)
    state[TENSORS["text_encoder"]].view(torch.uint8)[2, 3] = 0x7F
    save_file(state, tmp_path / "model.safetensors")
    text = say(chosen("text_encoder", tmp_path / "model.safetensors"))
    assert f"{TENSORS['text_encoder']} in {tmp_path / 'model.safetensors'} holds NaN or inf" in text


def test_one_that_the_dtype_cannot_hold_is_named(tmp_path):
    state = {name: tensor.float() for name, tensor in load_file(TRANSFORMER).items()}
    state[TENSORS["model"]][3, 4] = 1e30
    save_file(state, tmp_path / "model.safetensors")
    text = say(replace(chosen("model", tmp_path / "model.safetensors"), dtype="float16"))
    assert "blocks.1.ffn.net.0.proj.weight of the transformer does not fit into float16; choose the dtype" in text
