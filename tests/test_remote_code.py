"""A workflow alone runs no code: not by its tick, not by a path given as a hub id, not by what was uploaded."""

import json
import shutil

import pytest

from streamblocks.checkpoints.checkpoint_files import CheckpointError
from streamblocks.stream.materialise import materialise
from streamblocks.stream.recipe import REPOSITORY_BLOCKS, Recipe, is_hub_id
from streamblocks.stream.remote_code import REMOTE_CODE_VARIABLE

from embedded_program import needs_embedded_host, run_in_host
from foreign_repository import BLOCKS_PY, write_foreign_repository

pytestmark = pytest.mark.usefixtures("no_pipeline")


@pytest.fixture
def planted(tmp_path, tiny_folder):
    """A repository whose code leaves a file behind when it runs."""
    folder = write_foreign_repository(tmp_path / "input" / "evil", tiny_folder)
    canary = tmp_path / "canary"
    (folder / "blocks.py").write_text(f"open({str(canary)!r}, 'w').close()\n" + BLOCKS_PY)
    return folder, canary


@pytest.mark.parametrize("value", [None, "", "0", "yes"])
def test_the_tick_alone_runs_nothing(planted, monkeypatch, value):
    folder, canary = planted
    monkeypatch.delenv(REMOTE_CODE_VARIABLE, raising=False)
    if value is not None:
        monkeypatch.setenv(REMOTE_CODE_VARIABLE, value)
    with pytest.raises(PermissionError, match=REMOTE_CODE_VARIABLE):
        materialise(Recipe(model=str(folder), blocks=REPOSITORY_BLOCKS))
    assert not canary.exists()


def test_the_canary_sings_where_code_is_allowed(planted, monkeypatch):
    folder, canary = planted
    monkeypatch.setenv(REMOTE_CODE_VARIABLE, "1")
    materialise(Recipe(model=str(folder), blocks=REPOSITORY_BLOCKS))
    assert canary.exists()


def test_a_folder_named_like_a_hub_id_is_not_taken_for_one(planted, monkeypatch):
    folder, canary = planted
    monkeypatch.setenv(REMOTE_CODE_VARIABLE, "1")
    # As ComfyUI runs: what /upload/image takes lies in input/ below its working folder.
    monkeypatch.chdir(folder.parent.parent)
    recipe = Recipe("input/evil", blocks=REPOSITORY_BLOCKS, revision="0" * 40)
    with pytest.raises(CheckpointError, match="a path is never taken for a hub repository"):
        materialise(recipe)
    with pytest.raises(CheckpointError, match="a path is never taken for a hub repository"):
        materialise(Recipe("input/evil"))
    assert not canary.exists()


@pytest.mark.parametrize("path", ["input/evil/deeper", "./input/evil", "../evil", "evil", "..\\evil", ".hidden/model"])
def test_relative_paths_are_no_models(path):
    with pytest.raises(ValueError, match="absolute path"):
        Recipe(path)
    with pytest.raises(ValueError, match=r"components is .*absolute path"):
        Recipe("owner/name", components=path)


def test_a_path_is_never_a_hub_id(tmp_path):
    assert is_hub_id("krea/krea-realtime-video") and is_hub_id("gdhe17/Self-Forcing")
    for text in (str(tmp_path), "C:\\models\\wan", "/models", "a/b/c", "a/..", "a/b\n"):
        assert not is_hub_id(text)


@pytest.mark.parametrize("elsewhere", ["input/vae", "/etc", "../vae"])
def test_a_repository_takes_its_components_from_nowhere_else(planted, monkeypatch, elsewhere):
    """Its index could name any path on this machine: weights that nobody chose in the loader."""
    folder, _ = planted
    monkeypatch.setenv(REMOTE_CODE_VARIABLE, "1")
    monkeypatch.chdir(folder.parent.parent)
    # diffusers prefers what the repository has itself.
    shutil.move(folder / "vae", folder.parent / "vae")
    index = folder / "modular_model_index.json"
    facts = json.loads(index.read_text())
    facts["vae"][2]["pretrained_model_name_or_path"] = elsewhere
    index.write_text(json.dumps(facts))
    with pytest.raises(CheckpointError, match=r"takes its vae from|is also a path below"):
        materialise(Recipe(model=str(folder), blocks=REPOSITORY_BLOCKS))


@needs_embedded_host
def test_the_loader_takes_names_it_lists_and_hub_ids(tmp_path):
    """Through the node, as ComfyUI calls it: a linked input skips ComfyUI's own check of choices."""
    inside = tmp_path / "models" / "diffusers" / "good"
    inside.mkdir(parents=True)
    outside = tmp_path / "input" / "evil"
    outside.mkdir(parents=True)
    for folder in (inside, outside):
        (folder / "modular_config.json").write_text(json.dumps({"auto_map": {}}))
    facts = run_in_host(
        tmp_path,
        """
import importlib
# As a page may upload it.
uploaded = base / "temp" / "streamblocks_tiny_model"
uploaded.mkdir(parents=True)
(uploaded / "model_index.json").write_text("{}")
module = importlib.import_module(PACK + ".nodes.loader")
cls = module.LoadStreamingPipeline
def load(**changes):
    try:
        return cls.execute(**(loader | changes)).result[0].model
    except Exception as error:
        return f"{type(error).__name__}: {error}"
code = {"blocks_from": "the repository's own", "trust_remote_code": True}
report(good=load(model="diffusers/good"), up=load(model="diffusers/../../input/evil"),
       file=load(model="diffusion_models/../../input/evil/modular_config.json"),
       other=load(model="input/evil"), components=load(components="diffusers/../../input/evil"),
       path=load(model=module.HUB_MODEL, hub_id=str(base / "input/evil")),
       code=load(model="diffusers/good", **code), mini=load(model=module.MINI_MODEL, **code),
       tick=load(model="diffusers/good"), tiny=load(model=module.TINY_MODEL))
""",
    )
    assert facts["good"].endswith("models/diffusers/good")
    for name in ("up", "file", "other", "components"):
        assert "is not in ComfyUI's model folders" in facts[name], facts[name]
    assert "hub_id is" in facts["path"] and "into models/diffusers" in facts["path"]
    assert facts["code"].startswith("PermissionError") and REMOTE_CODE_VARIABLE in facts["code"]
    assert "brings none" in facts["mini"]
    # Built-in blocks run none of it.
    assert facts["tick"] == facts["good"]
    assert facts["tiny"] and not facts["tiny"].startswith(str(tmp_path))
