"""Loaded components: the same values as diffusers and transformers, and never a second copy."""

import gc
from shutil import copytree
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import UMT5EncoderModel

from streamblocks.checkpoints.checkpoint_files import CheckpointError, list_component_files
from streamblocks.checkpoints.checkpoint_reading import index_tensors
from streamblocks.checkpoints.row_sources import elements
from streamblocks.wan.checkpoints.pipeline_folder import check_pipeline_folder
from streamblocks.wan.checkpoints.tokenizer import load_tokenizer
from streamblocks.wan.transformer.joined_projections import fuse_self_attention, fused_rows

from wan_loading import component_bytes, load_text_encoder, load_transformer, load_vae

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def _same_state(ours: nn.Module, theirs: nn.Module) -> None:
    expected = theirs.state_dict()
    actual = ours.state_dict()
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype, name
        assert torch.equal(actual[name], tensor), name


def _velocity(transformer: Any, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    latents = torch.randn(1, 16, 3, 4, 6, generator=generator).to(dtype)
    text = torch.randn(1, 7, transformer.config.text_dim, generator=generator).to(dtype)
    with torch.no_grad():
        return transformer(latents, torch.tensor([700.0]), text).sample


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_vae_and_text_encoder_are_bitwise_those_of_their_makers(tiny_folder, dtype):
    vae = load_vae(tiny_folder, device="cpu", dtype=dtype)
    _same_state(vae, AutoencoderKLWan.from_pretrained(tiny_folder / "vae", torch_dtype=dtype))
    encoder = load_text_encoder(tiny_folder, device="cpu", dtype=dtype)
    theirs = UMT5EncoderModel.from_pretrained(tiny_folder / "text_encoder", dtype=dtype)
    _same_state(encoder, theirs)
    ids = torch.tensor([[70, 3, 71, 1]])
    with torch.no_grad():
        assert torch.equal(encoder(ids).last_hidden_state, theirs(ids).last_hidden_state)
    for module in (vae, encoder):
        assert not module.training
        assert not any(parameter.requires_grad for parameter in module.parameters())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_transformer_equals_diffusers_own(tiny_folder, dtype):
    ours = load_transformer(tiny_folder, device="cpu", dtype=dtype)
    theirs = WanTransformer3DModel.from_pretrained(tiny_folder / "transformer", torch_dtype=dtype)
    state = ours.state_dict()
    for name, tensor in theirs.state_dict().items():
        fused, rows = fused_rows(ours).get(name, (name, slice(None)))
        assert state[fused].dtype == tensor.dtype, name
        assert torch.equal(state[fused][rows], tensor), name
    expected = _velocity(theirs, dtype)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    assert (_velocity(ours, dtype) - expected).norm() <= tolerance * expected.norm()
    assert ours.rope.freqs_cos.device.type == "cpu"
    assert torch.equal(ours.rope.freqs_cos, theirs.rope.freqs_cos)


def test_tied_embeddings_are_one_tensor_whichever_name_is_stored(tiny_folder, tmp_path):
    expected = load_text_encoder(tiny_folder, device="cpu", dtype=torch.float32)
    state = load_file(tiny_folder / "text_encoder" / "model.safetensors")
    stored = {"shared.weight", "encoder.embed_tokens.weight"} & state.keys()
    embedding = state[stored.pop()]
    others = {name: tensor for name, tensor in state.items() if tensor is not embedding}
    for case, names in enumerate([["shared"], ["encoder.embed_tokens"], ["shared", "encoder.embed_tokens"]]):
        folder = copytree(tiny_folder / "text_encoder", tmp_path / str(case) / "text_encoder")
        save_file(others | {f"{name}.weight": embedding.clone() for name in names}, folder / "model.safetensors")
        encoder = load_text_encoder(folder.parent, device="cpu", dtype=torch.float32)
        assert encoder.shared.weight is encoder.encoder.embed_tokens.weight
        _same_state(encoder, expected)
        size = sum(parameter.nbytes for parameter in encoder.parameters())
        assert component_bytes(folder.parent, "text_encoder", torch.float32) == size


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_component_bytes_is_what_loading_takes(tiny_folder, dtype):
    loaders: dict[str, Any] = {"transformer": load_transformer, "vae": load_vae, "text_encoder": load_text_encoder}
    for component, load in loaders.items():
        state = load(tiny_folder, device="cpu", dtype=dtype)
        taken = sum(parameter.nbytes for parameter in state.parameters())
        assert component_bytes(tiny_folder, component, dtype) == taken


def test_loading_under_inference_mode_gives_ordinary_tensors(tiny_folder):
    torch.manual_seed(7)
    before = torch.get_rng_state()
    with torch.inference_mode():
        transformer = load_transformer(tiny_folder, device="cpu", dtype=torch.float32)
    assert torch.equal(torch.get_rng_state(), before)
    tensors = [*transformer.parameters(), *transformer.buffers()]
    assert not any(tensor.is_inference() or tensor.is_meta for tensor in tensors)


@pytest.fixture
def live_bytes():
    """A function that counts the bytes of the tensors made since the test began."""
    gc.collect()
    gc.freeze()  # objects alive now are neither counted nor searched

    def count() -> int:
        sizes: dict[int, int] = {}
        for thing in gc.get_objects():
            if issubclass(type(thing), torch.Tensor) and not thing.is_meta:
                start = thing.untyped_storage().data_ptr()
                sizes[start] = max(sizes.get(start, 0), thing.nbytes)
        return sum(sizes.values())

    yield count
    gc.unfreeze()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_loading_never_holds_a_second_copy(tiny_folder, live_bytes, dtype):
    stored = index_tensors(list_component_files(tiny_folder / "transformer"))
    largest = max(elements(tensor) * tensor.dtype.itemsize for tensor in stored.values())
    peaks: list[int] = []
    names: dict[str, int] = {}

    def measure(name: str, size: int) -> None:
        names[name] = size
        peaks.append(live_bytes())

    transformer = load_transformer(tiny_folder, device="cpu", dtype=dtype, on_tensor=measure)
    model = component_bytes(tiny_folder, "transformer", dtype)
    rope = transformer.rope.freqs_cos.nbytes + transformer.rope.freqs_sin.nbytes
    assert model <= max(peaks) - rope + 1024  # the measurement sees the model itself
    assert max(peaks) <= model + rope + largest + 1024
    assert sum(names.values()) == model


def test_fusing_a_loaded_transformer_deletes_the_old_projections(tiny_folder):
    theirs = WanTransformer3DModel.from_pretrained(tiny_folder / "transformer")
    expected, size = _velocity(theirs), sum(parameter.nbytes for parameter in theirs.parameters())
    rows = fused_rows(theirs)
    fuse_self_attention(theirs)
    layer = theirs.blocks[0].attn1.to_qkv
    fuse_self_attention(theirs)
    assert theirs.blocks[0].attn1.to_qkv is layer
    assert sum(parameter.nbytes for parameter in theirs.parameters()) == size
    assert not hasattr(theirs.blocks[0].attn1, "to_q")
    assert hasattr(theirs.blocks[0].attn2, "to_q")
    assert fused_rows(theirs) == rows
    assert rows["blocks.1.attn1.to_k.bias"] == ("blocks.1.attn1.to_qkv.bias", slice(64, 128))
    assert (_velocity(theirs) - expected).norm() <= 1e-5 * expected.norm()


def test_shards_load_like_the_single_file(tiny_folder, sharded_folder):
    _same_state(
        load_transformer(sharded_folder, device="cpu", dtype=torch.float32),
        load_transformer(tiny_folder, device="cpu", dtype=torch.float32),
    )


def test_pipeline_folders_are_checked(tiny_folder, tmp_path):
    check_pipeline_folder(tiny_folder)
    with pytest.raises(CheckpointError, match="not a folder"):
        check_pipeline_folder(tmp_path / "absent")
    with pytest.raises(CheckpointError, match="sub-folders transformer, vae, text_encoder, tokenizer, scheduler"):
        check_pipeline_folder(tmp_path)
    copytree(tiny_folder / "vae", tmp_path / "vae")
    with pytest.raises(CheckpointError, match="lacks the sub-folder scheduler:"):
        check_pipeline_folder(tmp_path, ["vae", "scheduler"])
    (tmp_path / "tokenizer").mkdir()
    with pytest.raises(CheckpointError, match="tokenizer holds no tokenizer"):
        load_tokenizer(tmp_path)


def test_another_class_in_the_folder_is_refused(tiny_folder, tmp_path):
    copytree(tiny_folder / "vae", tmp_path / "transformer")
    with pytest.raises(CheckpointError, match="holds a AutoencoderKLWan, and WanTransformer3DModel"):
        load_transformer(tmp_path, device="cpu", dtype=torch.float32)
    copytree(tiny_folder / "vae", tmp_path / "text_encoder")
    with pytest.raises(CheckpointError, match="umt5"):
        load_text_encoder(tmp_path, device="cpu", dtype=torch.float32)
