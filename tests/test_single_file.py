"""Single-file transformers: Wan's own names under each prefix, sizes, and refusals."""

import pytest
import torch
from accelerate import init_empty_weights
from diffusers import WanTransformer3DModel
from safetensors.torch import save_file

from streamblocks.checkpoints.checkpoint_files import CheckpointError
from streamblocks.wan.checkpoints.single_file import SingleFileCheckpoint, config_from_shapes, recognise_single_file

from wan_loading import component_bytes, load_transformer

# Diffusers' names to Wan's own, written out here so that the test is independent of the code it tests.
INVERSE = {
    "condition_embedder.time_embedder.linear_1": "time_embedding.0",
    "condition_embedder.time_embedder.linear_2": "time_embedding.2",
    "condition_embedder.text_embedder.linear_1": "text_embedding.0",
    "condition_embedder.text_embedder.linear_2": "text_embedding.2",
    "condition_embedder.time_proj": "time_projection.1",
    "attn1": "self_attn",
    "attn2": "cross_attn",
    "to_out.0": "o",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "norm2": "norm3",
    "ffn.net.0.proj": "ffn.0",
    "ffn.net.2": "ffn.2",
    "proj_out": "head.head",
}
PREFIXES = [
    "",
    "model.",
    "generator.",
    "generator_ema.",
    "model.diffusion_model.",
    "generator.model.",
    "generator_ema.model._fsdp_wrapped_module.",
]


def _original_name(name: str) -> str:
    if name == "scale_shift_table":
        return "head.modulation"
    if name.endswith(".scale_shift_table"):
        return name.replace("scale_shift_table", "modulation")
    for ours, wans in INVERSE.items():
        name = name.replace(ours, wans)
    return name


@pytest.fixture(scope="module")
def twin():
    """A transformer of two heads of 128 channels, as diffusers builds it."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return WanTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=128,
            text_dim=24,
            freq_dim=32,
            ffn_dim=192,
            num_layers=2,
            cross_attn_norm=True,
        ).eval()


@pytest.fixture(scope="module")
def original(twin):
    return {_original_name(name): tensor for name, tensor in twin.state_dict().items()}


def _velocity(transformer):
    generator = torch.Generator().manual_seed(3)
    latents = torch.randn(1, 16, 3, 4, 6, generator=generator)
    text = torch.randn(1, 7, 24, generator=generator)
    with torch.no_grad():
        return transformer(latents, torch.tensor([700.0]), text).sample


def _write(path, state, prefix="", metadata=None):
    save_file({prefix + name: tensor.contiguous() for name, tensor in state.items()}, path, metadata)
    return path


def _assert_is(transformer, twin):
    expected = _velocity(twin)
    assert (_velocity(transformer) - expected).norm() <= 1e-5 * expected.norm()


def test_the_renaming_here_is_wans(original):
    assert {
        "blocks.0.self_attn.q.weight",
        "blocks.1.cross_attn.norm_k.weight",
        "blocks.0.norm3.bias",
        "blocks.0.modulation",
        "blocks.0.ffn.0.weight",
        "head.modulation",
        "head.head.weight",
        "time_embedding.0.weight",
        "time_projection.1.bias",
        "patch_embedding.weight",
    } <= original.keys()


@pytest.mark.parametrize("prefix", PREFIXES, ids=lambda prefix: prefix or "none")
def test_wans_names_load_under_each_prefix(twin, original, tmp_path, prefix):
    path = _write(tmp_path / "wan.safetensors", original, prefix)
    checkpoint = recognise_single_file(path)
    assert checkpoint.prefix == prefix.replace("_fsdp_wrapped_module.", "")
    assert {name: twin.config[name] for name in checkpoint.config} == dict(checkpoint.config)
    assert checkpoint.name == "256x2 custom"
    assert checkpoint.sources.keys() == twin.state_dict().keys()
    _assert_is(load_transformer(path, device="cpu", dtype=torch.float32), twin)
    size = sum(parameter.nbytes for parameter in twin.parameters())
    assert component_bytes(path, "transformer", torch.float32) == size


def test_diffusers_names_load_too(twin, tmp_path):
    path = _write(tmp_path / "wan.safetensors", twin.state_dict(), "model.")
    _assert_is(load_transformer(path, device="cpu", dtype=torch.float32), twin)


def test_the_moving_average_is_chosen(twin, original, tmp_path):
    state = {f"generator_ema.{name}": tensor for name, tensor in original.items()}
    state |= {f"generator.{name}": torch.zeros_like(tensor) for name, tensor in original.items()}
    state |= {"critic.head.weight": torch.zeros(2)}
    path = _write(tmp_path / "wan.safetensors", state)
    assert recognise_single_file(path).prefix == "generator_ema."
    _assert_is(load_transformer(path, device="cpu", dtype=torch.float32), twin)


@pytest.mark.parametrize(
    ("name", "sizes"),
    [("1.3B", (1536, 8960, 30, 12)), ("14B", (5120, 13824, 40, 40))],
    ids=["1.3B", "14B"],
)
def test_known_sizes_are_recognised(tmp_path, name, sizes):
    dim, ffn, layers, heads = sizes
    config = {"num_attention_heads": heads, "ffn_dim": ffn, "num_layers": layers, "text_dim": 4096}
    with init_empty_weights():
        model = WanTransformer3DModel(**config)
    shapes = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    assert shapes["patch_embedding.weight"][0] == dim
    found = config_from_shapes(tmp_path, shapes)
    assert found == {key: model.config[key] for key in found}
    assert SingleFileCheckpoint(tmp_path, "", found, {}).name == name


def test_without_cross_attention_norm(twin, original, tmp_path):
    plain = {name: tensor for name, tensor in original.items() if ".norm3." not in name}
    path = _write(tmp_path / "wan.safetensors", plain)
    assert recognise_single_file(path).config["cross_attn_norm"] is False
    load_transformer(path, device="cpu", dtype=torch.float32)


def _wider_input(state):
    state["patch_embedding.weight"] = torch.zeros(256, 36, 1, 2, 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.update({"img_emb.proj.0.weight": torch.zeros(4)}), "image-to-video transformer"),
        (_wider_input, "takes 36 latent channels and gives 16"),
        (lambda s: s.update({"vace_blocks.0.before_proj.weight": torch.zeros(4)}), "is a VACE transformer"),
        (lambda s: s.pop("patch_embedding.weight"), "holds no Wan transformer"),
        (lambda s: s.pop("time_embedding.0.weight"), "neither Wan's names"),
        (lambda s: s.update({"blocks.0.self_attn.q.comfy_quant": torch.zeros(4)}), "metadata that cannot be read"),
        (lambda s: s.update({"head.head.weight": torch.zeros(4)}), r"proj_out\.weight is \[4\]"),
        (lambda s: s.update({"patch_embedding.weight": torch.zeros(200, 16, 1, 2, 2)}), "no multiple of 128"),
        (lambda s: [s.pop(name) for name in list(s) if name.startswith("blocks.0.")], r"blocks\.0\."),
        (lambda s: s.pop("blocks.1.ffn.2.bias"), r"lacks blocks\.1\.ffn\.net\.2\.bias"),
        (lambda s: s.update({"ref_conv.weight": torch.zeros(4)}), r"has unknown ref_conv\.weight"),
        (
            lambda s: s.update({f"generator.{name}": tensor.clone() for name, tensor in list(s.items())}),
            "several transformers, under '', 'generator.'",
        ),
    ],
    ids=[
        "i2v", "36 channels", "vace", "no anchor", "no names", "quantized", "bad shape", "odd width", "layer",
        "missing", "unknown", "two",
    ],
)  # fmt: skip
def test_what_is_not_a_plain_text_to_video_transformer_is_refused(original, tmp_path, change, message):
    state = dict(original)
    change(state)
    path = _write(tmp_path / "wan.safetensors", state)
    with pytest.raises(CheckpointError, match=message) as caught:
        load_transformer(path, device="cpu", dtype=torch.float32)
    assert str(path) in str(caught.value)


def test_unreadable_quantization_metadata_is_refused(original, tmp_path):
    path = _write(tmp_path / "wan.safetensors", original, metadata={"_quantization_metadata": "{}"})
    with pytest.raises(CheckpointError, match="metadata that cannot be read"):
        recognise_single_file(path)


def test_other_files_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match="does not exist"):
        load_transformer(tmp_path / "absent.safetensors", device="cpu", dtype=torch.float32)
    (tmp_path / "wan.gguf").write_bytes(b"GGUF")
    with pytest.raises(CheckpointError, match=r"is a GGUF file.*Quantize Pipeline"):
        load_transformer(tmp_path / "wan.gguf", device="cpu", dtype=torch.float32)
    vae = _write(tmp_path / "vae.safetensors", {"decoder.conv1.weight": torch.zeros(2)})
    with pytest.raises(CheckpointError, match="holds no Wan transformer"):
        load_transformer(vae, device="cpu", dtype=torch.float32)
