"""What nodes list of ComfyUI's model folders, and that it is what they find, by ComfyUI's own `folder_paths`."""

from __future__ import annotations

import importlib
import itertools
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from comfyui_server import comfyui_found, comfyui_path

ROOT = Path(__file__).resolve().parent.parent
COMFY_MODULES = ("comfy", "comfy.options", "comfy.cli_args", "folder_paths")

pytestmark = pytest.mark.skipif(not comfyui_found(), reason="real ComfyUI not found: set COMFYUI_PATH")


@pytest.fixture
def folder_paths(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """ComfyUI's own module, imported anew, with no roots for the kinds of models that are looked at."""
    monkeypatch.syspath_prepend(comfyui_path())
    for name in COMFY_MODULES:
        # So that this import is undone afterwards: others in this process must not see it.
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
        del sys.modules[name]
    module = importlib.import_module("folder_paths")
    for kind in ("diffusers", "diffusion_models", "vae", "vae_approx", "text_encoders", "loras"):
        extensions = module.folder_names_and_paths[kind][1]
        module.folder_names_and_paths[kind] = ([], extensions)
    return module


@pytest.fixture
def host(folder_paths: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """`host.models_on_disk` without the rest of `host`, which needs all of ComfyUI."""
    room = ModuleType("streamblocks.host")
    room.__path__ = [str(ROOT / "host")]
    monkeypatch.setitem(sys.modules, "streamblocks.host", room)
    yield importlib.import_module("streamblocks.host.models_on_disk")
    for name in [name for name in sys.modules if name.startswith("streamblocks.host.")]:
        del sys.modules[name]


@pytest.fixture
def roots(folder_paths: ModuleType, tmp_path: Path) -> tuple[Path, Path]:
    """Two roots of every kind, as with an extra_model_paths.yaml; the first one's models come first."""
    pair = tmp_path / "models", tmp_path / "extra"
    for root, kind in itertools.product(
        pair, ("diffusers", "diffusion_models", "vae", "vae_approx", "text_encoders", "loras")
    ):
        (root / kind).mkdir(parents=True)
        folder_paths.add_model_folder_path(kind, str(root / kind))
    return pair


def make_folder(folder: Path, *components: str) -> Path:
    for name in components:
        (folder / name).mkdir(parents=True)
        (folder / name / "config.json").write_text("{}")
    return folder


def make_file(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(path.parts[-3].encode())
    return path


def make_snapshot(cache: Path, commit: str, *components: str) -> Path:
    """A snapshot as huggingface_hub lays it out: links to blobs."""
    blob = cache / "blobs/1234"
    blob.parent.mkdir(parents=True, exist_ok=True)
    blob.write_text("{}")
    snapshot = cache / "snapshots" / commit
    for name in components:
        (snapshot / name).mkdir(parents=True)
        (snapshot / name / "config.json").symlink_to("../../../blobs/1234")
    return snapshot


def found(host: ModuleType) -> dict[str, Path]:
    """What is listed, each looked up by its name."""
    return {name: Path(host.resolve_model(name)) for name in host.diffusers_folders()}


def test_folders_are_found_three_levels_deep_and_pipelines_are_not_entered(host, roots):
    root = roots[0] / "diffusers"
    here = [make_folder(root / name, "transformer", "vae") for name in ("krea", "wan/krea", "a/b/c")]
    make_folder(root / "a/b/c2/d", "transformer")
    make_folder(root / "krea/older", "transformer")
    make_folder(root / "krea/vae/older", "transformer")
    make_folder(root / ".cache/huggingface/download", "transformer")
    expected = {f"diffusers/{name}": path for name, path in zip(("krea", "wan/krea", "a/b/c"), here, strict=True)}
    assert found(host) == expected
    assert host.pipeline_folders() == sorted(expected)


def test_folders_of_components_only_are_no_models(host, roots):
    root = roots[0] / "diffusers"
    make_folder(root / "whole", "transformer", "vae", "text_encoder", "tokenizer")
    make_folder(root / "parts/wan", "vae", "text_encoder")
    make_folder(root / "words", "tokenizer")
    make_folder(root / "other", "scheduler")
    make_folder(root / "modular").mkdir()
    (root / "modular/modular_model_index.json").write_text("{}")
    assert list(found(host)) == [f"diffusers/{name}" for name in ("modular", "parts/wan", "whole", "words")]
    assert host.pipeline_folders() == ["diffusers/modular", "diffusers/whole"]


def test_a_folder_that_somebody_called_vae_hides_no_pipelines_beside_it(host, roots):
    root = roots[0] / "diffusers"
    make_folder(root / "wan/vae/older", "transformer")
    make_folder(root / "wan/krea", "transformer")
    assert host.pipeline_folders() == ["diffusers/wan/krea"]


def test_of_one_name_in_two_roots_the_first_is_listed_and_found(host, roots, folder_paths):
    first, _ = (make_folder(root / "diffusers/wan/krea", "transformer") for root in roots)
    alone = make_folder(roots[1] / "diffusers/alone", "vae")
    assert found(host) == {"diffusers/alone": alone, "diffusers/wan/krea": first}
    files = {
        "diffusion_models": (host.transformer_files, host.resolve_model),
        "vae": (host.vae_files, host.resolve_model),
        "vae_approx": (host.approximate_vae_files, host.resolve_model),
        "text_encoders": (host.text_encoder_files, host.resolve_model),
        "loras": (host.lora_files, host.resolve_lora),
    }
    for kind, (names, resolve) in files.items():
        prefix = "" if kind == "loras" else f"{kind}/"
        first, _ = (make_file(root / kind / "sub/same.safetensors") for root in roots)
        other = make_file(roots[1] / kind / "other.sft")
        assert {name: Path(resolve(name)) for name in names()} == {
            f"{prefix}other.sft": other,
            f"{prefix}sub/same.safetensors": first,
        }
        assert [name.removeprefix(prefix) for name in names()] == folder_paths.get_filename_list(kind)


def test_files_are_listed_where_comfyui_lists_them(host, roots, folder_paths):
    for suffix in (".safetensors", ".sft", ".pt", ".pth", ".bin", ".ckpt", ".gguf", ".txt"):
        make_file(roots[0] / "vae" / f"x{suffix}")
    assert host.vae_files() == [f"vae/{name}" for name in folder_paths.get_filename_list("vae")]
    assert {Path(name).suffix for name in host.vae_files()} == {".safetensors", ".sft", ".pt", ".pth", ".bin", ".ckpt"}


def test_the_hub_caches_main_snapshot_is_listed_under_the_repositorys_name(host, roots):
    root = roots[1] / "diffusers"
    cache = root / "models--wan--realtime.14b"
    old, main, new = (make_snapshot(cache, commit, "transformer", "vae") for commit in ("1aa", "2bb", "3cc"))
    make_snapshot(root / "models--legacy", "4dd", "vae")
    make_folder(root / "models--wan--realtime.14b/.no_exist/1aa", "transformer")
    for age, snapshot in enumerate((new, old, main)):
        os.utime(snapshot, (1e9 - age, 1e9 - age))
    assert found(host) == {
        "diffusers/legacy": root / "models--legacy/snapshots/4dd",
        "diffusers/wan/realtime.14b": new,
    }
    (cache / "refs").mkdir()
    (cache / "refs/main").write_text("2bb")
    assert found(host)["diffusers/wan/realtime.14b"] == main
    # Another branch was downloaded, and of this one a config only.
    (cache / "refs/main").write_text("5ee")
    make_snapshot(cache, "5ee").mkdir()
    assert found(host)["diffusers/wan/realtime.14b"] == new
    plain = make_folder(root / "wan/realtime.14b", "vae")
    assert found(host)["diffusers/wan/realtime.14b"] == plain


def test_the_users_own_hub_cache_is_not_offered(host, roots, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    make_snapshot(tmp_path / "hf/hub/models--krea--realtime", "1aa", "transformer")
    assert found(host) == {}


def test_links_are_followed_and_loops_end(host, roots, tmp_path):
    root = roots[0] / "diffusers"
    elsewhere = make_folder(tmp_path / "drive/wan/krea", "transformer")
    (root / "linked").symlink_to(elsewhere, target_is_directory=True)
    (root / "drive").symlink_to(tmp_path / "drive/wan", target_is_directory=True)
    (elsewhere.parent / "up").symlink_to(root, target_is_directory=True)
    (root / "here").symlink_to(root, target_is_directory=True)
    assert found(host) == {"diffusers/linked": root / "linked", "diffusers/drive/krea": root / "drive/krea"}
    file = make_file(tmp_path / "drive/wan/vae.safetensors")
    (roots[0] / "vae/link.safetensors").symlink_to(file)
    assert Path(host.resolve_model("vae/link.safetensors")).samefile(file)


def test_what_cannot_be_read_hides_only_itself_and_is_named_once(host, roots, tmp_path, monkeypatch, caplog):
    root = roots[0] / "diffusers"
    fine = make_folder(root / "fine", "transformer")
    make_folder(root / "locked/krea", "transformer")
    (root / "itself").symlink_to(root / "itself")
    (root / "gone").symlink_to(tmp_path / "unplugged", target_is_directory=True)
    # Root may read everything, so the refusal is played.
    scandir = os.scandir

    def refuse(place: str | Path) -> Iterator[os.DirEntry[str]]:
        if Path(place).name == "locked":
            raise PermissionError(13, "Permission denied", str(place))
        return scandir(place)

    monkeypatch.setattr(os, "scandir", refuse)
    assert found(host) == {"diffusers/fine": fine} == found(host)
    said = [record.getMessage() for record in caplog.records if "left out of the list" in record.getMessage()]
    assert sorted(Path(line.split(" is left out")[0]).name for line in said) == ["gone", "itself", "locked"]


def test_a_broken_link_to_a_file_is_not_listed(host, roots):
    vae = make_file(roots[0] / "vae/good.safetensors")
    (roots[0] / "vae/gone.safetensors").symlink_to(roots[0] / "nowhere.safetensors")
    assert host.vae_files() == ["vae/good.safetensors"]
    # In the first root broken, in the second there: ComfyUI takes the second.
    second = make_file(roots[1] / "vae/gone.safetensors")
    assert Path(host.resolve_model("vae/gone.safetensors")) == second
    assert Path(host.resolve_model("vae/good.safetensors")) == vae


def test_an_unplugged_folder_of_files_hides_only_its_own(host, roots, tmp_path):
    make_file(roots[0] / "vae/good.safetensors")
    make_file(tmp_path / "drive/vae/far.safetensors")
    (roots[0] / "vae/drive").symlink_to(tmp_path / "drive/vae", target_is_directory=True)
    assert host.vae_files() == ["vae/drive/far.safetensors", "vae/good.safetensors"]
    (tmp_path / "drive").rename(tmp_path / "unplugged")
    assert host.vae_files() == ["vae/good.safetensors"]


@pytest.mark.parametrize(
    "name",
    [
        "diffusers/../secret",
        "diffusers/krea/../krea",
        "diffusers/krea/vae",
        "diffusers",
        "diffusers/",
        "vae/../vae/x.safetensors",
        "vae/./x.safetensors",
        "loras/x.safetensors",
        "/etc",
        "",
    ],
)
def test_only_listed_names_are_found(host, roots, name):
    make_folder(roots[0] / "diffusers/krea", "transformer", "vae")
    make_folder(roots[0] / "secret", "transformer")
    for kind in ("vae", "loras"):
        make_file(roots[0] / kind / "x.safetensors")
    with pytest.raises(ValueError, match="is not in ComfyUI's model folders: refresh the page"):
        host.resolve_model(name)
    with pytest.raises(ValueError, match="is not in models/loras: refresh the page"):
        host.resolve_lora(name)


def test_folders_are_read_once_and_files_in_pipelines_never(host, roots, monkeypatch):
    root = roots[0] / "diffusers"
    for index in range(3):
        make_folder(root / f"wan/{index}", "transformer", "vae")
    scandir, read = os.scandir, []

    def remember(place: str | Path) -> Iterator[os.DirEntry[str]]:
        read.append(Path(place).relative_to(roots[0] if Path(place).is_relative_to(roots[0]) else roots[1]).as_posix())
        return scandir(place)

    monkeypatch.setattr(os, "scandir", remember)
    host.resolve_model("diffusers/wan/1")
    expected = ["diffusers", "diffusers/wan", "diffusers/wan/0", "diffusers/wan/1", "diffusers/wan/2"]
    assert sorted(read) == sorted([*expected, "diffusers"])
