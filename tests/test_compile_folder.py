"""Where torch.compile keeps its code."""

import pytest
import torch

from streamblocks.ops.compile_folder import FOLDER_VARIABLE, keep_compiled_code, lasting_folder


@pytest.fixture
def caches(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("sys.platform", "linux")
    # Set first, so that the variable as it was comes back.
    monkeypatch.setenv(FOLDER_VARIABLE, "before")
    monkeypatch.delenv(FOLDER_VARIABLE)
    return tmp_path


def test_torch_compiles_into_the_users_folder_for_caches(caches):
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    keep_compiled_code()
    assert cache_dir() == str(caches / "streamblocks" / f"torch-{torch.__version__}")


def test_a_folder_that_was_chosen_stays(caches, monkeypatch):
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    monkeypatch.setenv(FOLDER_VARIABLE, str(caches / "mine"))
    keep_compiled_code()
    assert cache_dir() == str(caches / "mine") and not (caches / "streamblocks").exists()


def test_torchs_own_choice_stays_where_the_folder_cannot_be_made(caches, monkeypatch):
    import os

    (caches / "streamblocks").write_text("a file in its place")
    keep_compiled_code()
    assert FOLDER_VARIABLE not in os.environ


@pytest.mark.parametrize(
    ("platform", "environment", "expected"),
    [
        ("linux", {}, ".cache/streamblocks"),
        ("linux", {"XDG_CACHE_HOME": ""}, ".cache/streamblocks"),
        ("darwin", {}, "Library/Caches/streamblocks"),
        ("win32", {}, "AppData/Local/streamblocks"),
    ],
)
def test_the_folder_by_platform(platform, environment, expected, monkeypatch, tmp_path):
    monkeypatch.setattr("pathlib.Path.home", lambda: tmp_path)
    assert lasting_folder(environment, platform).parent == tmp_path / expected
