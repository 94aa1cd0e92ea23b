"""Fixtures shared by the tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from layouts import users_files

from streamblocks.stream.materialise import release_materialised
from streamblocks.stream.remote_code import REMOTE_CODE_VARIABLE
from streamblocks.wan.geometry import WAN_22_GEOMETRY
from streamblocks.wan.tiny_model import write_tiny_model

from comfyui_server import ComfyUIServer, comfyui_found, comfyui_path

# The tensors here are tiny: more threads only wait for each other, for minutes on a busy machine.
torch.set_num_threads(1)

PACK_ROOT = Path(__file__).resolve().parent.parent
# Nothing may depend on the name of the folder: users clone, copy and rename it. Without a space: ComfyUI 0.33 asks
# aiohttp for a route with the space quoted and then compares it unquoted, so no pack's page files would be found.
PACK_FOLDER = "my-stream.pack.v2"


@pytest.fixture(scope="session")
def comfyui_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ComfyUIServer]:
    """A real ComfyUI with this pack in it, started once for all tests that ask for it."""
    if not comfyui_found():
        pytest.skip(f"real ComfyUI not found at {comfyui_path()}: set COMFYUI_PATH")
    models = users_files(tmp_path_factory.mktemp("files"))
    with ComfyUIServer(tmp_path_factory.mktemp("comfyui"), packs={PACK_FOLDER: PACK_ROOT}, models=models) as server:
        yield server


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny random pipeline in diffusers' layout; not to be written to."""
    return write_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def tiny_folder_22(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny random pipeline with the proportions of Wan 2.2's 5B; not to be written to."""
    return write_tiny_model(tmp_path_factory.mktemp("models") / "tiny22", geometry=WAN_22_GEOMETRY)


@pytest.fixture
def no_pipeline() -> Iterator[None]:
    """No pipeline is materialised before the test, and none after it."""
    release_materialised()
    yield
    release_materialised()


@pytest.fixture
def remote_code_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a server that allows repositories to run their own code."""
    monkeypatch.setenv(REMOTE_CODE_VARIABLE, "1")
