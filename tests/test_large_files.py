"""A file is never mapped whole: headers and rows are read by offset, whatever the size of the file."""

import json
import subprocess
import sys

import pytest
import torch

from streamblocks.checkpoints.checkpoint_files import CheckpointError
from streamblocks.checkpoints.row_sources import read_whole
from streamblocks.checkpoints.safetensors_reading import read_header

GIGABYTES = 40

PROGRAM = """
import sys
from pathlib import Path
import psutil, torch
from streamblocks.checkpoints.safetensors_reading import read_header
before = psutil.Process().memory_info().rss
header = read_header(Path(sys.argv[1]))
last = header.tensors["last"]
rows = 0
for start, values in last.chunks(torch.device("cpu")):
    assert start == rows and bool((values[:, 0] == 3).all())
    rows += values.shape[0]
info = psutil.Process().memory_info()
print(rows, info.rss - before)
"""


def write_sparse(path):
    """40 GB of holes, and at their end 64 MB of threes."""
    rows, columns = 2048, 16384
    begin = GIGABYTES * 10**9
    entries = {
        "__metadata__": {"format": "pt"},
        "hole": {"dtype": "BF16", "shape": [begin // 2], "data_offsets": [0, begin]},
        "last": {"dtype": "BF16", "shape": [rows, columns], "data_offsets": [begin, begin + 2 * rows * columns]},
    }
    text = json.dumps(entries).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.seek(8 + len(text) + begin)
        file.write(torch.full((rows, columns), 3.0, dtype=torch.bfloat16).view(torch.uint8).numpy().tobytes())
    return path


def test_a_40_gb_file_takes_a_few_megabytes_to_read_from(tmp_path):
    path = write_sparse(tmp_path / "large.safetensors")
    assert path.stat().st_size > GIGABYTES * 10**9
    if path.stat().st_blocks * 512 > 10**9:
        pytest.skip("this file system keeps no holes")
    done = subprocess.run([sys.executable, "-c", PROGRAM, str(path)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    rows, added = map(int, done.stdout.split()[-2:])
    assert rows == 2048
    assert added < 200 * 10**6
    # A file as long as the machine's memory cannot be mapped; this one is not even read.
    assert read_header(path).tensors["hole"].shape == (GIGABYTES * 10**9 // 2,)


def test_a_file_that_shrinks_while_it_is_read_is_named(tmp_path):
    """If the file were mapped, truncating it would kill the process."""
    path = write_sparse(tmp_path / "large.safetensors")
    chunks = read_header(path).tensors["last"].chunks(torch.device("cpu"))
    next(chunks)
    with path.open("r+b") as file:
        file.truncate(GIGABYTES * 10**9)
    with pytest.raises(CheckpointError, match=r"last in .*large\.safetensors ends too early"):
        for _ in chunks:
            pass


@pytest.mark.parametrize(
    ("entry", "says"),
    [
        ({"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}, "which is not"),
        ({"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]}, "shape"),
        ({"dtype": "F32", "shape": [2], "data_offsets": [8, 0]}, "data_offsets"),
        ({"dtype": "F32", "shape": [2], "data_offsets": [0, 8, 9]}, "header cannot be read"),
        ({"dtype": "F32", "shape": [2.0], "data_offsets": [0, 8]}, "shape"),
        ({"dtype": "F32", "data_offsets": [0, 8]}, "header cannot be read"),
        ([], "header cannot be read"),
    ],
    ids=str,
)
def test_headers_that_lie_are_refused(tmp_path, entry, says):
    text = json.dumps({"weight": entry}).encode()
    path = tmp_path / "lies.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"\0" * 8)
    with pytest.raises(CheckpointError, match=says) as told:
        read_header(path)
    assert str(path) in str(told.value)


def test_values_are_those_of_safetensors_own_reader(tmp_path):
    from safetensors.torch import load_file, save_file

    generator = torch.Generator().manual_seed(0)
    state = {
        "matrix": torch.randn(5000, 700, generator=generator),
        "half": torch.randn(3, 4, 5, generator=generator).half(),
        "brain": torch.randn(7, generator=generator).bfloat16(),
        "eight": torch.randn(9, 2, generator=generator).to(torch.float8_e4m3fn),
        "flag": torch.tensor([True, False, True]),
        "scalar": torch.tensor(2.5, dtype=torch.float64),
        "empty": torch.zeros(0, 3),
        "odd": torch.arange(5, dtype=torch.uint8),
    }
    path = tmp_path / "all.safetensors"
    save_file(state, path)
    header = read_header(path)
    theirs = load_file(path)
    assert header.tensors.keys() == theirs.keys()
    for name, tensor in theirs.items():
        ours = read_whole(header.tensors[name])
        assert ours.dtype == tensor.dtype and ours.shape == tensor.shape
        assert torch.equal(
            ours.view(torch.uint8) if ours.ndim else ours, tensor.view(torch.uint8) if ours.ndim else tensor
        )
