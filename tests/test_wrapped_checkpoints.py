"""The makers' tiny transformer in every wrapper and nesting gives the makers' values, as safetensors and as .pt."""

import pytest
import torch
from safetensors.torch import save_file

from streamblocks.wan.checkpoints import single_file
from streamblocks.wan.checkpoints.single_file import recognise_single_file
from streamblocks.wan.transformer.attention_passes import CausalPass
from streamblocks.wan.transformer.causal_transformer import (
    allocate_cross_cache,
    allocate_kv_cache,
    fill_cross_cache,
    predict_velocity,
)
from streamblocks.wan.transformer.installed_attention import install_causal_attention

from golden_wan import load_golden, relative_error
from wan_loading import load_transformer

TOLERANCE = 1e-5
PASS = "recompute/block0/step1"


def inside(wrapper):
    """Between the number of a layer and what is in it, as wrapping the layer puts it."""
    return lambda name: ".".join((*name.split(".")[:2], wrapper + name.split(".", 2)[2])) if "blocks." in name else name


# Keys of the dicts around the weights, and what happens to their names.
WRAPPINGS = {
    "none": ((), str),
    **{
        prefix: ((), lambda name, prefix=prefix: prefix + name)
        for prefix in (
            "model.", "module.", "net.", "_orig_mod.", "_fsdp_wrapped_module.", "diffusion_model.", "state_dict.",
            "base_model.model.", "model.diffusion_model.", "generator_ema.", "generator.", "module.model._orig_mod.",
        )
    },
    "layers in FSDP": ((), inside("_fsdp_wrapped_module.")),
    "layers checkpointed": ((), inside("_checkpoint_wrapped_module.")),
    "layers compiled": ((), inside("_orig_mod.")),
    "layers in DDP": ((), inside("module.")),
    "nested generator_ema": (("generator_ema",), str),
    "nested generator": (("generator",), lambda name: f"model.{name}"),
    "nested model": (("model",), str),
    "nested state_dict": (("state_dict",), lambda name: f"net.{name}"),
    "state_dict in model": (("model", "state_dict"), str),
    "all at once": (
        ("state_dict", "generator_ema"),
        lambda name: "model._fsdp_wrapped_module." + inside("_fsdp_wrapped_module._checkpoint_wrapped_module.")(name),
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def golden():
    return load_golden()


@pytest.fixture(scope="module")
def weights(golden):
    prefix = "weights/"
    return {name.removeprefix(prefix): tensor for name, tensor in golden.items() if name.startswith(prefix)}


@pytest.fixture(autouse=True)
def heads_of_32_channels(monkeypatch):
    """The one size that shapes do not show: Wan's heads have 128 channels, the tiny model's 32."""
    monkeypatch.setattr(single_file, "HEAD_DIM", 32)


def nest(weights, dicts, rename):
    content = {rename(name): tensor for name, tensor in weights.items()}
    for key in reversed(dicts):
        content = {key: content}
    return content


def flatten(content, prefix=""):
    for key, value in content.items():
        if isinstance(value, dict):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def write(path, content):
    if path.suffix in (".safetensors", ".sft"):
        save_file({name: tensor.clone() for name, tensor in flatten(content)}, path)
    else:
        torch.save(content, path)
    return path


def error_of(path, golden):
    transformer = load_transformer(path, device="cpu", dtype=torch.float32)
    install_causal_attention(transformer)
    cross_cache = allocate_cross_cache(transformer, text_tokens=16)
    fill_cross_cache(transformer, cross_cache, golden["text"], "golden")
    cache = allocate_kv_cache(transformer, frames=6, latent_height=4, latent_width=6, sink_frames=0)
    cached = CausalPass(cache, cross_cache, frame_offset=0)
    return relative_error(
        predict_velocity(transformer, golden[f"{PASS}/in"], 937.0, cached), golden[f"{PASS}/velocity"]
    )


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_every_wrapping_gives_the_makers_values(golden, weights, tmp_path, wrapping, suffix):
    path = write(tmp_path / f"wan{suffix}", nest(weights, *WRAPPINGS[wrapping]))
    assert error_of(path, golden) <= TOLERANCE


@pytest.mark.parametrize("suffix", [".sft", ".pth", ".bin", ".ckpt"])
def test_every_suffix_is_read(golden, weights, tmp_path, suffix):
    assert error_of(write(tmp_path / f"wan{suffix}", {"model": weights}), golden) <= TOLERANCE


@pytest.mark.parametrize(("suffix", "written"), [(".safetensors", ".pt"), (".pt", ".safetensors")])
def test_a_wrong_suffix_does_not_matter(golden, weights, tmp_path, suffix, written):
    path = write(tmp_path / f"wan{written}", weights).rename(tmp_path / f"wan{suffix}")
    assert error_of(path, golden) <= TOLERANCE


def test_a_file_from_before_pytorch_1_6_is_read(golden, weights, tmp_path):
    torch.save({"generator": weights}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    assert error_of(tmp_path / "old.pt", golden) <= TOLERANCE


def test_a_pytorch_that_does_not_say_where_storages_lie_maps_the_file(golden, weights, tmp_path, monkeypatch):
    from streamblocks.checkpoints import torch_file_reading

    path = write(tmp_path / "wan.pt", weights)
    monkeypatch.setattr(torch_file_reading, "_storage_offset", lambda tensor: None)
    assert {type(source).__name__ for source in recognise_single_file(path).sources.values()} == {"HeldTensor"}
    assert error_of(path, golden) <= TOLERANCE


def test_a_training_checkpoint_has_its_average_taken_unless_asked_otherwise(golden, weights, tmp_path):
    wrong = {f"model.{name}": torch.zeros_like(tensor) for name, tensor in weights.items()}
    content = {
        "generator": wrong,
        "generator_ema": {f"model.{name}": tensor for name, tensor in weights.items()},
        "critic": {"model.head.head.weight": torch.zeros(3)},
        "fake_score": wrong,
        "optimizer": {"state": {0: {"exp_avg": torch.zeros(5)}}, "param_groups": [{"lr": 1e-4}]},
        "step": 600,
    }
    path = write(tmp_path / "model.pt", content)
    assert error_of(path, golden) <= TOLERANCE
    trained = recognise_single_file(path, averaged=False)
    assert trained.prefix == "generator.model." and trained.sources.keys() == recognise_single_file(path).sources.keys()


def test_strided_and_tied_tensors_in_a_pt(golden, weights, tmp_path):
    """Matrices turned, all biases views of one buffer as FSDP leaves them, and one tensor under two names."""
    biases = {name: tensor for name, tensor in weights.items() if tensor.ndim == 1}
    buffer = torch.cat([tensor.reshape(-1) for tensor in biases.values()])
    parts = dict(zip(biases, buffer.split([tensor.numel() for tensor in biases.values()]), strict=True))
    turned = {name: tensor.t().contiguous().t() for name, tensor in weights.items() if tensor.ndim == 2}
    content = {"generator": weights | parts | turned}
    content["generator_ema"] = content["generator"]
    path = write(tmp_path / "wan.pt", content)
    assert path.stat().st_size < 1.5 * sum(tensor.nbytes for tensor in weights.values())
    assert error_of(path, golden) <= TOLERANCE
