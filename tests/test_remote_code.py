"""A workflow runs no code: not by its tick, not by what it loads, not by a path given as a hub id."""

import json
import os
import pickle
import shutil
import sys
from contextlib import ExitStack
from dataclasses import replace

import pytest
import torch
from canary_repository import singing, write_canary_folder, write_canary_repository

from streamblocks.checkpoints.checkpoint_files import CheckpointError
from streamblocks.checkpoints.lora_choice import LoraChoice
from streamblocks.stream.code_consent import AllowedCode, CodeNotAllowedError, Consent, allow_code, read_allowed_code
from streamblocks.stream.code_files import read_code
from streamblocks.stream.convert import convert_checkpoint
from streamblocks.stream.file_stamp import stamp_files
from streamblocks.stream.materialise import materialise, release_materialised
from streamblocks.stream.recipe import REPOSITORY_BLOCKS, Recipe, is_hub_id
from streamblocks.stream.session import Session
from streamblocks.stream.settings import StreamSettings

from embedded_program import needs_embedded_host, run_in_host
from fake_hub import COMMIT, fake_hub, point_libraries_at
from foreign_repository import BLOCKS_PY

pytestmark = pytest.mark.usefixtures("no_pipeline")

SMALL = StreamSettings(32, 32, blocks=1, steps=1)


@pytest.fixture(autouse=True)
def as_a_server_of_old(tmp_path, monkeypatch):
    """It allowed code by this variable; whoever asks on a terminal is told yes; uploads lie below its folder."""
    monkeypatch.setenv("STREAMBLOCKS_ALLOW_REMOTE_CODE", "1")
    monkeypatch.setenv("HF_HUB_TRUST_REMOTE_CODE", "1")
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))


@pytest.fixture
def canary(tmp_path):
    return tmp_path / "canary"


@pytest.fixture
def planted(tmp_path, tiny_folder, canary):
    """Where an upload would be: a repository of code."""
    return write_canary_repository(tmp_path / "input" / "evil", tiny_folder, canary)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Serves a folder as `owner/model`."""

    def serve(folder):
        address, _ = opened.enter_context(fake_hub("owner/model", folder))
        point_libraries_at(monkeypatch, address, tmp_path / "hub")

    with ExitStack() as opened:
        yield serve


def consent_to(*codes):
    return AllowedCode(consents=frozenset(map(Consent.to, codes)))


def run_one_block(recipe, allowed_code=None):
    pipeline = materialise(recipe, **({} if allowed_code is None else {"allowed_code": allowed_code}))
    with Session(pipeline, SMALL) as session:
        return session.run_block("a").frames


def test_built_in_blocks_run_no_code_whatever_they_load(tmp_path, tiny_folder, canary, hub):
    folder = write_canary_folder(tmp_path / "input" / "evil", tiny_folder, canary)
    plain, evil = str(tiny_folder), str(folder)
    hub(folder)
    # transformers knows no such class, and would ask.
    asking = tmp_path / "asking"
    shutil.copytree(folder / "tokenizer", asking / "tokenizer")
    config = asking / "tokenizer" / "tokenizer_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"tokenizer_class": "Canary"}))
    recipes = {
        "model and components": Recipe(evil, components=evil),
        "parts": Recipe(plain, vae=evil, text_encoder=evil, tokenizer=evil),
        "tokenizer": Recipe(plain, tokenizer=str(asking)),
        "hub": Recipe("owner/model"),
    }
    ran = {}
    for name, recipe in recipes.items():
        try:
            run_one_block(recipe)
        except CheckpointError as error:
            ran[name] = str(error)
    assert list(ran) == ["tokenizer"] and str(asking) in ran["tokenizer"]
    assert not canary.exists()


def test_pickled_code_runs_neither_as_a_lora_nor_converted(tmp_path, tiny_folder, canary):
    class Canary:
        def __reduce__(self):
            return (exec, (singing(canary),))

    file = tmp_path / "evil.pt"
    torch.save({"lora": Canary()}, file)
    pickle.loads(pickle.dumps(Canary()))
    canary.unlink()
    with pytest.raises(CheckpointError):
        run_one_block(Recipe(str(tiny_folder), loras=(LoraChoice(str(file), 1.0),)))
    with pytest.raises(CheckpointError):
        convert_checkpoint(file, tmp_path / "out.safetensors", averaged=True, on_progress=lambda *_: None)
    with pytest.raises(CheckpointError):
        run_one_block(Recipe(str(file), components=str(tiny_folder)))
    assert not canary.exists()


def test_a_folder_runs_by_consent_until_a_byte_changes(planted, canary, tmp_path):
    file = tmp_path / "user" / "list.json"
    recipe = Recipe(str(planted), blocks=REPOSITORY_BLOCKS)
    with pytest.raises(CodeNotAllowedError, match=r"^[^\n]*allow_code\.py[^\n]*$") as refused:
        materialise(recipe, allowed_code=read_allowed_code(file))
    assert not canary.exists() and str(file) in str(refused.value)
    allow_code(file, refused.value.code)
    materialise(recipe, allowed_code=read_allowed_code(file))
    assert canary.exists()
    release_materialised()
    canary.unlink()
    # As rsync copies: same size, same time.
    code, times = planted / "blocks.py", (planted / "blocks.py").stat()
    stamp = stamp_files(str(planted))
    code.write_text(code.read_text().replace("0.5", "0.6"))
    os.utime(code, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert code.stat().st_size == times.st_size and stamp_files(str(planted)) != stamp
    with pytest.raises(CodeNotAllowedError):
        materialise(replace(recipe, stamp="other"), allowed_code=read_allowed_code(file))
    code.write_text(code.read_text().replace("0.6", "0.5"))
    (planted / "more.py").touch()
    with pytest.raises(CodeNotAllowedError):
        materialise(recipe, allowed_code=read_allowed_code(file))
    (planted / "more.py").unlink()
    # Consent is to a place, too.
    moved = planted.rename(planted.with_name("moved"))
    with pytest.raises(CodeNotAllowedError):
        materialise(Recipe(str(moved), blocks=REPOSITORY_BLOCKS), allowed_code=read_allowed_code(file))
    assert not canary.exists()


def test_a_hub_repository_runs_by_consent_to_its_commit(planted, canary, hub):
    index = json.loads((planted / "modular_model_index.json").read_text().replace(str(planted), "owner/model"))
    (planted / "modular_model_index.json").write_text(json.dumps(index))
    hub(planted)
    recipe = Recipe("owner/model", blocks=REPOSITORY_BLOCKS)
    with pytest.raises(ValueError, match="pinned commit"):
        materialise(recipe)
    recipe = replace(recipe, revision=COMMIT)
    with pytest.raises(CodeNotAllowedError, match=f"owner/model --commit {COMMIT}") as refused:
        materialise(recipe, allowed_code=consent_to(replace(refused_code(planted), place="owner/model")))
    assert not canary.exists()
    assert run_one_block(recipe, consent_to(refused.value.code)).shape[0] == 9
    assert canary.exists()


def refused_code(folder):
    """Without the commit, which is part of a consent."""
    return read_code(str(folder))


def test_tokenizers_bring_no_code_even_with_consent(tmp_path, tiny_folder, canary):
    folder = write_canary_repository(tmp_path / "evil", tiny_folder, canary, tokenizer=True)
    with pytest.raises(CheckpointError, match="did not provide tokenizer"):
        materialise(Recipe(str(folder), blocks=REPOSITORY_BLOCKS), allowed_code=consent_to(read_code(str(folder))))
    assert canary.exists() and not canary.with_name("tokenizer_canary").exists()


@pytest.mark.parametrize("hint", [["input.uploaded", "X"], ["uploaded", "X"], ["diffusers", "DiffusionPipeline"]])
@pytest.mark.parametrize("own_blocks", [False, True])
def test_an_index_imports_nothing(planted, canary, tmp_path, hint, own_blocks):
    """To look up the class of a component, diffusers has imported its library, whatever it was."""
    for place in (tmp_path, tmp_path / "input"):
        (place / "uploaded.py").write_text(singing(canary) + "class X: pass\n")
    (planted / "blocks.py").write_text(BLOCKS_PY)
    if not own_blocks:
        (planted / "modular_config.json").unlink()
    index = json.loads((planted / "modular_model_index.json").read_text())
    index["vae"][2]["type_hint"] = hint
    (planted / "modular_model_index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="only classes of diffusers and transformers"):
        materialise(Recipe(str(planted), blocks=REPOSITORY_BLOCKS), allowed_code=consent_to(read_code(str(planted))))
    assert not canary.exists()


def test_kernels_of_the_hub_are_not_fetched(planted, canary):
    config = planted / "text_encoder" / "config.json"
    config.write_text(
        json.dumps(json.loads(config.read_text()) | {"deeper": [{"attn_implementation": "owner/kernels"}]})
    )
    with pytest.raises(CheckpointError, match=r"text_encoder/config\.json .* 'owner/kernels'"):
        materialise(Recipe(str(planted), blocks=REPOSITORY_BLOCKS), allowed_code=consent_to(read_code(str(planted))))
    assert not canary.exists()


def test_a_model_of_the_repositorys_own_is_its_code(planted, canary):
    """As Krea Realtime's: the transformer's config names a class beside it, which imports another file there."""
    index = json.loads((planted / "modular_model_index.json").read_text())
    index["transformer"][2]["type_hint"] = [None, None]
    (planted / "modular_model_index.json").write_text(json.dumps(index))
    config = planted / "transformer" / "config.json"
    own = {"auto_map": {"AutoModel": "causal.Own"}}
    config.write_text(json.dumps(json.loads(config.read_text()) | own))
    (planted / "transformer" / "causal.py").write_text("from .base import Base\nclass Own(Base): pass\n")
    (planted / "transformer" / "base.py").write_text("from diffusers import WanTransformer3DModel as Base\n")
    pipeline = materialise(
        Recipe(str(planted), blocks=REPOSITORY_BLOCKS), allowed_code=consent_to(read_code(str(planted)))
    )
    assert type(pipeline.pipe.transformer).__name__ == "Own"
    (planted / "modular_config.json").unlink()
    release_materialised()
    with pytest.raises(CheckpointError, match=r"none for its blocks|can be used here"):
        materialise(Recipe(str(planted), blocks=REPOSITORY_BLOCKS))


def test_two_repositories_share_no_module(tmp_path, tiny_folder, canary):
    before = set(sys.modules)
    means = []
    for name, bound in (("one", 1.0), ("two", -1.0)):
        folder = write_canary_repository(tmp_path / name, tiny_folder, canary)
        (folder / "helper.py").write_text(f"LEAST, MOST = -1.0, {bound}\n")
        blocks = BLOCKS_PY.replace("clamp(-1, 1)", "clamp(LEAST, MOST)")
        # In a function: it is imported while the stream runs.
        blocks = blocks.replace(
            "        vae = components.vae\n", "        vae = components.vae\n        from .helper import LEAST, MOST\n"
        )
        (folder / "blocks.py").write_text(blocks)
        frames = run_one_block(Recipe(str(folder), blocks=REPOSITORY_BLOCKS), consent_to(read_code(str(folder))))
        means.append(frames.float().mean().item())
    assert means[0] > means[1] == 0
    release_materialised()
    assert not {name for name in set(sys.modules) - before if "blocks" in name or "helper" in name}
    assert not [finder for finder in sys.meta_path if type(finder).__name__ == "ImportedCode"]


def test_a_folder_named_like_a_hub_id_is_not_taken_for_one(planted, canary):
    with pytest.raises(CheckpointError, match="a path is never taken for a hub repository"):
        materialise(Recipe("input/evil", blocks=REPOSITORY_BLOCKS, revision="0" * 40))
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
def test_a_repository_takes_its_components_from_nowhere_else(planted, elsewhere):
    """Its index could name any path on this machine: weights that nobody chose in the loader."""
    # diffusers prefers what the repository has itself.
    shutil.move(planted / "vae", planted.parent / "vae")
    index = planted / "modular_model_index.json"
    facts = json.loads(index.read_text())
    facts["vae"][2]["pretrained_model_name_or_path"] = elsewhere
    index.write_text(json.dumps(facts))
    with pytest.raises(CheckpointError, match=r"takes its vae from|is also a path below"):
        materialise(Recipe(str(planted), blocks=REPOSITORY_BLOCKS), allowed_code=consent_to(read_code(str(planted))))


@needs_embedded_host
def test_nodes_run_no_code_until_the_tool_was_asked(tmp_path, tiny_folder, canary):
    """Through the nodes, as ComfyUI calls them: a linked input skips ComfyUI's own check of choices."""
    inside = write_canary_repository(tmp_path / "models" / "diffusers" / "good", tiny_folder, canary)
    outside = write_canary_repository(tmp_path / "input" / "evil", tiny_folder, canary)
    assert inside.is_dir() and outside.is_dir()
    facts = run_in_host(
        tmp_path,
        """
import importlib, shlex, subprocess
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
own = {"blocks_from": "the repository's own"}
names = dict(good=load(model="diffusers/good"), up=load(model="diffusers/../../input/evil"),
    file=load(model="diffusion_models/../../input/evil/modular_config.json"),
    other=load(model="input/evil"), components=load(components="diffusers/../../input/evil"),
    path=load(model=module.HUB_MODEL, hub_id=str(base / "input/evil")), mini=load(model=module.MINI_MODEL, **own),
    tiny=load(model=module.TINY_MODEL))
loader |= {"model": "diffusers/good", **own}
del prompt[next(id for id, node in prompt.items() if node["class_type"] == "StreamBlocksQuantizePipeline")]
loader_id = next(id for id, node in prompt.items() if node["class_type"] == "StreamBlocksLoadPipeline")
sampler["pipeline"] = [loader_id, 0]
sampler["blocks"] = 1
refused = []
for tick in (False, True):
    loader["trust_remote_code"] = tick
    try:
        run()
    except Exception as error:
        refused.append(f"{type(error).__name__}: {error}")
sung = (base / "canary").exists()
command = refused[-1].partition("read it with ")[2].partition(" and allow it there")[0]
told = [subprocess.run(shlex.split(command), input=answer, capture_output=True, text=True) for answer in ("no", "yes")]
sung_by_tool = (base / "canary").exists()
run()
report(**names, refused=refused, sung=sung, sung_by_tool=sung_by_tool, sung_at_last=(base / "canary").exists(),
       told=[one.stdout + one.stderr for one in told], codes=[one.returncode for one in told], command=command)
""",
        imported=False,
    )
    assert facts["good"].endswith("models/diffusers/good")
    for name in ("up", "file", "other", "components"):
        assert "is not in ComfyUI's model folders" in facts[name], facts[name]
    assert "hub_id is" in facts["path"] and "into models/diffusers" in facts["path"]
    assert "brings none" in facts["mini"]
    assert facts["tiny"] and not facts["tiny"].startswith(str(tmp_path))
    assert len(facts["refused"]) == 2 and all(one.startswith("CodeNotAllowedError") for one in facts["refused"])
    assert facts["codes"] == [1, 0] and "class ForeignBlocks" in facts["told"][0]
    assert "user/__streamblocks/allowed_code.json" in facts["command"]
    assert (facts["sung"], facts["sung_by_tool"], facts["sung_at_last"]) == (False, False, True)
