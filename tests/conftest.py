"""Fixtures shared by the tests."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from diffusers import WanTransformer3DModel
from layouts import users_files

from streamblocks.stream import memory_fit, picture_encoding
from streamblocks.stream.code_consent import AllowedCode
from streamblocks.stream.estimate import MemoryEstimate
from streamblocks.stream.materialise import materialise, release_materialised
from streamblocks.stream.recipe import Recipe
from streamblocks.stream.stream_pipeline import StreamPipeline
from streamblocks.wan.geometry import WAN_22_GEOMETRY
from streamblocks.wan.tiny_model import write_tiny_model

from comfyui_server import ComfyUIServer, comfyui_found, comfyui_path
from remembered_rehearsals import remember_rehearsals

# The tensors here are tiny: more threads only wait for each other, for minutes on a busy machine.
torch.set_num_threads(1)
# So do those of the programs that tests start: two such programs spend most of their time in OpenMP's busy waiting.
os.environ.setdefault("OMP_NUM_THREADS", "1")

PACK_ROOT = Path(__file__).resolve().parent.parent
# Nothing may depend on the name of the folder: users clone, copy and rename it. Without a space: ComfyUI 0.33 asks
# aiohttp for a route with the space quoted and then compares it unquoted, so no pack's page files would be found.
PACK_FOLDER = "my-stream.pack.v2"


def pytest_collection_finish() -> None:
    """Let garbage collection pass over what the imports made: half a million objects, dozens of times in some tests.

    What tests make comes later, and is collected and counted as ever.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="module", autouse=True)
def modules_before_are_passed_over() -> None:
    """The same for what earlier test files have imported and made; those that count tensors compare two counts."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    """Otherwise libraries that look for leaks at exit would report all of it."""
    gc.unfreeze()


@pytest.fixture(scope="session", autouse=True)
def rehearsals_remembered() -> Iterator[None]:
    """A rehearsal takes ten times as long as a block of the tiny model."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("streamblocks.wan.rehearsal.rehearse_streaming_bytes", remember_rehearsals())
        yield


@pytest.fixture(scope="session")
def comfyui_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ComfyUIServer]:
    """A real ComfyUI with this pack in it, started once for all tests that ask for it."""
    if not comfyui_found():
        pytest.skip(f"real ComfyUI not found at {comfyui_path()}: set COMFYUI_PATH")
    models = users_files(tmp_path_factory.mktemp("files"))
    with ComfyUIServer(tmp_path_factory.mktemp("comfyui"), packs={PACK_FOLDER: PACK_ROOT}, models=models) as server:
        yield server


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    """Nothing is compiled yet, and nothing counted, in `torch._dynamo.utils.counters`."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny random pipeline in diffusers' layout; not to be written to."""
    return write_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def tiny_folder_22(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny random pipeline with the proportions of Wan 2.2's 5B; not to be written to."""
    return write_tiny_model(tmp_path_factory.mktemp("models") / "tiny22", geometry=WAN_22_GEOMETRY)


@pytest.fixture(scope="session")
def sharded_folder(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny transformer in several shards, in a pipeline folder of its own; not to be written to."""
    folder = tmp_path_factory.mktemp("sharded")
    transformer = WanTransformer3DModel.from_pretrained(tiny_folder / "transformer")
    transformer.save_pretrained(folder / "transformer", max_shard_size="100KB")
    assert len(list((folder / "transformer").glob("*.safetensors"))) > 2
    return folder


@pytest.fixture
def no_pipeline() -> Iterator[None]:
    """No pipeline is materialised before the test, and none after it."""
    release_materialised()
    yield
    release_materialised()


@pytest.fixture(scope="module")
def pipeline(tiny_folder: Path) -> Iterator[StreamPipeline]:
    """Of the tiny model. A rehearsal takes longer than most streams of it, and is tested by itself."""
    release_materialised()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory_fit, "estimate_memory", lambda *_: MemoryEstimate(1, 1, 1, 1, 1))
        yield materialise(Recipe(model=str(tiny_folder)))
    release_materialised()


@pytest.fixture
def remote_code_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the user had allowed the code of every repository."""
    monkeypatch.setattr(AllowedCode, "admits", lambda *_: True)


@pytest.fixture
def encodings(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many pictures each block had that was encoded for pages."""
    made: list[int] = []
    encode = picture_encoding.encode_pictures

    def counted(frames: torch.Tensor, *most: int) -> picture_encoding.EncodedPictures:
        made.append(len(frames))
        return encode(frames, *most)

    monkeypatch.setattr(picture_encoding, "encode_pictures", counted)
    return made
