"""PyTorch's files: rows read by offset, no code run, and what is damaged or too much is refused in one sentence."""

import io
import os
import pickle
import zipfile

import pytest
import torch

from streamblocks.checkpoints import torch_file_reading
from streamblocks.checkpoints.checkpoint_files import CheckpointError
from streamblocks.checkpoints.checkpoint_reading import read_checkpoint
from streamblocks.checkpoints.row_sources import read_whole
from streamblocks.ops import weight_filling


def make_tensors():
    generator = torch.Generator().manual_seed(0)
    whole = torch.randn(24, 40, generator=generator)
    return {
        "whole": whole,
        "turned": whole.t(),
        "columns": whole[:, 3:9],
        "rows": whole[5:11],
        "every second": whole[::2, ::3],
        "expanded": whole[:1].expand(7, 40),
        "moved axes": whole.view(24, 5, 8).permute(1, 2, 0),
        "parameter": torch.nn.Parameter(whole[2]),
        "scalar": torch.tensor(3.5),
        "empty": torch.empty(0, 4),
        "bfloat16": whole.bfloat16(),
        "float8": whole.to(torch.float8_e4m3fn),
        "turned float8": whole.to(torch.float8_e5m2).t(),
        "int": torch.arange(5),
        "bool": torch.tensor([True, False]),
    }


@pytest.mark.parametrize("chunk_elements", [1, 64, 2**20])
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before 1.6"])
def test_every_tensor_is_read_as_torch_reads_it(tmp_path, monkeypatch, chunk_elements, zipped):
    monkeypatch.setattr(weight_filling, "CHUNK_ELEMENTS", chunk_elements)
    # The old format has no word for float8.
    tensors = {name: tensor for name, tensor in make_tensors().items() if zipped or "float8" not in name}
    torch.save({"nested": {"twice": tensors}, "step": 3}, tmp_path / "t.pt", _use_new_zipfile_serialization=zipped)
    read = read_checkpoint(tmp_path / "t.pt").tensors
    assert read.keys() == {f"nested.twice.{name}" for name in tensors}
    for name, tensor in tensors.items():
        source = read[f"nested.twice.{name}"]
        assert (source.shape, source.dtype) == (tuple(tensor.shape), tensor.dtype), name
        assert torch.equal(read_whole(source).to(torch.float64), tensor.detach().to(torch.float64)), name


def test_a_file_saved_on_a_gpu_is_read_without_one(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:0")
    torch.save({"weight": torch.ones(3)}, tmp_path / "t.pt")
    monkeypatch.undo()
    assert torch.equal(read_whole(read_checkpoint(tmp_path / "t.pt").tensors["weight"]), torch.ones(3))


class Planted:
    """Writes a file when it is unpickled."""

    def __init__(self, canary, how):
        self.call = {
            "system": (os.system, (f"touch {canary}",)),
            "exec": (exec, (f"open({str(canary)!r}, 'w').close()",)),
            "open": (io.open, (str(canary), "w")),
        }[how]

    def __reduce__(self):
        return self.call


def save_zip(content, path):
    torch.save(content, path)


def save_legacy(content, path):
    torch.save(content, path, _use_new_zipfile_serialization=False)


def save_pickle(content, path):
    path.write_bytes(pickle.dumps(content))


@pytest.mark.parametrize("how", ["system", "exec", "open"])
@pytest.mark.parametrize("save", [save_zip, save_legacy, save_pickle])
def test_a_planted_object_is_refused_and_leaves_no_trace(tmp_path, how, save):
    canary, path = tmp_path / "canary", tmp_path / "model.pt"
    save({"model": {"weight": torch.ones(2)}, "planted": Planted(canary, how)}, path)
    with pytest.raises(CheckpointError, match="so it is not opened") as raised:
        read_checkpoint(path)
    assert str(path) in str(raised.value) and "\n" not in str(raised.value)
    assert list(tmp_path.iterdir()) == [path]
    # The plant works: it is the reading that leaves no trace.
    if save is save_pickle:
        pickle.loads(path.read_bytes())
    else:
        torch.load(path, weights_only=False)
    assert canary.exists()


class Harmless:
    """Stands for a class of a training program."""


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"args": Harmless()}, r"asks for \S*test_torch_files\.Harmless when it is opened"),
        (torch.nn.Linear(2, 2), r"asks for torch\.nn\.modules\.linear\.Linear"),
        ({"step": 3}, "holds no dict of tensors"),
        (torch.ones(2), "holds no dict of tensors"),
        ({"a": {"b": torch.ones(2)}, "a.b": torch.ones(2)}, r"holds a\.b twice"),
    ],
    ids=["class", "module", "nothing", "bare tensor", "twice"],
)
def test_other_contents_are_refused(tmp_path, content, message):
    torch.save(content, tmp_path / "t.pt")
    with pytest.raises(CheckpointError, match=message) as raised:
        read_checkpoint(tmp_path / "t.pt")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("kept", [0, 3, 5, 100, 2000, 0.5, -1, -30], ids=str)
@pytest.mark.parametrize("save", [save_zip, save_legacy])
def test_a_truncated_file_is_named(tmp_path, save, kept):
    path = tmp_path / "t.pt"
    save({"model": {"weight": torch.ones(60, 60), "bias": torch.ones(60)}}, path)
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content)) if isinstance(kept, float) else kept])
    with pytest.raises(CheckpointError, match=r"t\.pt is not a .*: download it again") as raised:
        read_checkpoint(path)
    assert "\n" not in str(raised.value)


def test_a_file_that_becomes_shorter_while_it_is_read_is_named(tmp_path):
    path = tmp_path / "t.pt"
    torch.save({"weight": torch.ones(60, 60), "turned": torch.ones(50, 60).t()}, path)
    sources = read_checkpoint(path).tensors
    os.truncate(path, 1500)
    for source in sources.values():
        with pytest.raises(CheckpointError, match="its file has become shorter"):
            read_whole(source)


def test_a_compressed_file_is_refused(tmp_path):
    torch.save({"weight": torch.ones(60, 60)}, tmp_path / "plain.pt")
    with zipfile.ZipFile(tmp_path / "plain.pt") as plain, zipfile.ZipFile(tmp_path / "t.pt", "w", 8) as packed:
        for name in plain.namelist():
            packed.writestr(name, plain.read(name))
    with pytest.raises(CheckpointError, match="is a compressed zip file"):
        read_checkpoint(tmp_path / "t.pt")


def test_a_script_is_refused(tmp_path):
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), tmp_path / "t.pt")
    with pytest.raises(CheckpointError, match="is a TorchScript archive"):
        read_checkpoint(tmp_path / "t.pt")


def test_a_large_old_file_is_refused(tmp_path, monkeypatch):
    save_legacy({"weight": torch.ones(3)}, tmp_path / "t.pt")
    monkeypatch.setattr(torch_file_reading, "LARGEST_LEGACY_FILE", 100)
    with pytest.raises(CheckpointError, match=r"from before 1\.6 .* save it again with a newer PyTorch"):
        read_checkpoint(tmp_path / "t.pt")
