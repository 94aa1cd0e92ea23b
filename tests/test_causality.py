"""What a checkpoint says about being causal, and about its blocks."""

import json
from dataclasses import replace

import pytest
import torch
from diffusers import WanTransformer3DModel
from file_streams import FILES, SHORT, stream
from layouts import LAYOUTS, TRANSFORMER
from safetensors.torch import load_file, save_file

from streamblocks.checkpoints.checkpoint_files import CheckpointError
from streamblocks.checkpoints.lora_choice import LoraChoice
from streamblocks.ops.quantization import QuantizationSpec
from streamblocks.stream.convert import convert_checkpoint
from streamblocks.wan.checkpoints.components import transformer_component
from streamblocks.wan.checkpoints.quantized_checkpoint import save_quantized_transformer
from streamblocks.wan.family import CAUSAL_WAN_21

SIZES = {"num_attention_heads": 1, "ffn_dim": 256, "freq_dim": 32, "num_layers": 1, "text_dim": 48}


def write_file(path, metadata=None):
    plain = {name.removeprefix("model."): tensor for name, tensor in load_file(TRANSFORMER).items()}
    if path.suffix == ".pt":
        torch.save({"generator_ema": plain}, path)
    else:
        save_file(plain, path, metadata)
    return path


def write_folder(folder, config):
    (folder / "transformer").mkdir(parents=True)
    WanTransformer3DModel(**SIZES).save_pretrained(folder / "transformer")
    path = folder / "transformer" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    return folder


def notices(source, **options):
    return CAUSAL_WAN_21.notices(transformer_component(source, dtype=torch.float32, **options))


@pytest.mark.parametrize(
    "name",
    ["wan2.1_t2v_1.3B_bf16", "wan2.1_t2v_14B_fp8_e4m3fn", "wan2.1_t2v_14B_fp8_scaled", "Wan2_1-T2V-1_3B_fp16"],
)
def test_a_published_bidirectional_file_is_said_to_be_one(tmp_path, name):
    [notice] = notices(write_file(tmp_path / f"{name}.safetensors"))
    assert notice.startswith(f"{name} is a model that was trained to see all frames at once")
    assert notice.endswith(".") and "\n" not in notice


@pytest.mark.parametrize(
    ("name", "metadata"),
    [
        ("wan2.1_t2v_1.3B_self_forcing_dmd.safetensors", None),
        ("causal_wan.safetensors", None),
        ("krea-realtime-video-14b.safetensors", None),
        ("wan2.1_t2v_1.3B_bf16.safetensors", {"config": '{"transformer": {"causal_ar": true}}'}),
        ("wan2.1_t2v_1.3B_bf16.pt", None),
    ],
    ids=["finetune", "other", "krea", "header", "training checkpoint"],
)
def test_what_may_be_causal_is_left_in_peace(tmp_path, name, metadata):
    assert notices(write_file(tmp_path / name, metadata)) == ()


def test_a_lora_may_make_it_causal(tmp_path):
    path = write_file(tmp_path / "wan2.1_t2v_1.3B_bf16.safetensors", {"config": "no JSON"})
    assert len(notices(path)) == 1
    assert notices(path, loras=[LoraChoice(str(LAYOUTS / "lora_peft.safetensors"))]) == ()


@pytest.mark.parametrize(
    ("place", "config", "expected"),
    [
        ("Wan2.1-T2V-1.3B-Diffusers", {}, 1),
        ("models--Wan-AI--Wan2.1-T2V-14B-Diffusers/snapshots/0123", {}, 1),
        ("Wan2.1-T2V-1.3B-Diffusers", {"_class_name": "CausalWanTransformer3DModel"}, 0),
        ("Wan2.1-T2V-1.3B-Diffusers", {"num_frame_per_block": 3}, 0),
        ("SFWan2.1-T2V-1.3B-Diffusers", {}, 0),
    ],
)
def test_folders(tmp_path, place, config, expected):
    assert len(notices(write_folder(tmp_path / place, config))) == expected


@pytest.mark.usefixtures("no_pipeline")
def test_the_notice_reaches_the_settings_output(tmp_path):
    path = write_file(tmp_path / "wan2.1_t2v_1.3B_bf16.safetensors")
    assert (
        "expect blurred pictures" in stream(replace(FILES, model=str(path)), settings=SHORT)[2].as_dict()["notices"][0]
    )


@pytest.mark.parametrize("key", ["num_frames_per_block", "num_frame_per_block"])
def test_frames_per_block_of_a_config_are_known_and_survive_what_is_written(tmp_path, key):
    folder = write_folder(tmp_path / "model", {"_class_name": "CausalWanTransformer3DModel", key: 1})
    assert frames(folder) == 1
    convert_checkpoint(folder, tmp_path / "plain.safetensors", on_progress=lambda *_: None)
    assert frames(tmp_path / "plain.safetensors") == 1
    spec = QuantizationSpec("int8", "per row")
    loaded = transformer_component(folder, dtype=torch.float32, quantization=spec).load("cpu")
    save_quantized_transformer(loaded, tmp_path / "int8.safetensors")
    assert frames(tmp_path / "int8.safetensors") == 1


def frames(source):
    return CAUSAL_WAN_21.choose_preset(transformer_component(source, dtype=torch.float32)).frames_per_block


def test_a_model_that_says_nothing_has_its_presets_frames_per_block(tmp_path):
    assert frames(TRANSFORMER) == 3
    assert frames(write_folder(tmp_path / "null", {"num_frames_per_block": None})) == 3


@pytest.mark.parametrize("value", [0, -3, 2.5, "three", True])
def test_frames_per_block_that_are_no_number_are_refused(tmp_path, value):
    folder = write_folder(tmp_path, {"num_frames_per_block": value})
    with pytest.raises(CheckpointError, match=f"has num_frames_per_block {value!r} in its config, allowed are"):
        frames(folder)
