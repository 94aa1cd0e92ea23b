"""A stranger's index and configs, by a workflow alone: nothing they name runs, and nothing is read outside of them."""

import json
import shutil
import threading
import time
from contextlib import ExitStack

import pytest
from canary_repository import singing
from diffusers.modular_pipelines import ModularPipeline

from streamblocks.checkpoints.checkpoint_files import CheckpointError
from streamblocks.stream.code_consent import AllowedCode, CodeNotAllowedError, Consent
from streamblocks.stream.code_files import read_code
from streamblocks.stream.materialise import materialise, release_materialised
from streamblocks.stream.recipe import REPOSITORY_BLOCKS, Recipe

from fake_hub import COMMIT, fake_hub, no_hub, point_libraries_at
from foreign_repository import write_foreign_repository

pytestmark = pytest.mark.usefixtures("no_pipeline")
KERNELS = "evil/kernels"


class Cancelled(BaseException):
    pass


@pytest.fixture
def repository(tmp_path, tiny_folder, monkeypatch):
    """With code that is allowed, so that only what it names is in question; `kernels` would run what they fetch."""
    for name in ("TRUST_REMOTE_CODE", "HF_HUB_TRUST_REMOTE_CODE"):
        monkeypatch.setenv(name, "1")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "uploaded.py").write_text(singing(tmp_path / "canary") + "class X: pass\n")
    return write_foreign_repository(tmp_path / "repository", tiny_folder)


@pytest.fixture
def serve(monkeypatch, tmp_path):
    def at(address):
        point_libraries_at(monkeypatch, address, tmp_path / "hub")

    with ExitStack() as opened:
        yield lambda hub: at(found[0] if isinstance(found := opened.enter_context(hub), tuple) else found)


def change(file, **values):
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def name_in_index(folder, component, **values):
    file = folder / "modular_model_index.json"
    index = json.loads(file.read_text())
    index[component][2] |= values
    file.write_text(json.dumps(index))


def load(folder, **options):
    allowed = AllowedCode(consents=frozenset({Consent.to(read_code(str(folder)))}))
    return materialise(Recipe(str(folder), blocks=REPOSITORY_BLOCKS), allowed_code=allowed, **options)


def name_class(library, name):
    return lambda folder: name_in_index(folder, "text_encoder", type_hint=[library, name])


def name_subfolder(place):
    def name(folder):
        shutil.move(folder / "vae", folder.parent / "vae")
        name_in_index(folder, "vae", subfolder=place.format(outside=folder.parent / "vae"))

    return name


def hide_kernels(**values):
    return lambda folder: change(folder / "text_encoder" / "config.json", **values)


def hide_kernels_deeper(folder):
    (folder / "deep").mkdir()
    shutil.move(folder / "text_encoder", folder / "deep" / "er")
    name_in_index(folder, "text_encoder", subfolder="deep/er")
    change(folder / "deep" / "er" / "config.json", _attn_implementation=KERNELS)


def plant_adapter(place, **values):
    adapter = {"base_model_name_or_path": "evil/model", "peft_type": "LORA", **values}
    return lambda folder: (folder / place / "adapter_config.json").write_text(json.dumps(adapter))


def write_in_capitals(name):
    return lambda folder: (folder / name).rename(folder / name.capitalize())


@pytest.mark.parametrize(
    ("plant", "sentence"),
    [
        (name_class("transformers", "RagRetriever"), "only classes of"),
        (name_class("transformers", "Trainer"), "only classes of"),
        (name_class("diffusers", "OnnxRuntimeModel"), "only classes of"),
        (name_class("diffusers", "SequentialPipelineBlocks"), "only classes of"),
        (name_class("os", "system"), "only classes of"),
        (name_class("uploaded", "X"), "only classes of"),
        (name_subfolder("../vae"), "may be outside"),
        (name_subfolder("{outside}"), "may be outside"),
        (name_subfolder("..\\vae"), "may be outside"),
        (hide_kernels(attn_implementation="sdpa", _attn_implementation=KERNELS), "names kernels of the hub"),
        (hide_kernels(_experts_implementation=KERNELS), "names kernels of the hub"),
        (hide_kernels_deeper, "deep/er/config.json of .* names kernels"),
        (write_in_capitals("modular_model_index.json"), "rename it"),
        # peft imports the module.
        (plant_adapter("text_encoder", megatron_config={}, megatron_core="uploaded"), "another model loaded in place"),
        (plant_adapter("."), "^adapter_config.json of .* another model loaded"),
    ],
)
def test_it_is_refused_by_name(repository, plant, sentence):
    plant(repository)
    with pytest.raises(CheckpointError, match=sentence):
        load(repository)
    assert not (repository.parent / "canary").exists()


def test_kernels_and_adapters_of_a_component_from_another_repository_are_refused(repository, serve):
    other = repository.parent / "other"
    (repository / "text_encoder").rename(other.joinpath("text_encoder") if not other.mkdir() else None)
    change(other / "text_encoder" / "config.json", _attn_implementation=KERNELS)
    name_in_index(repository, "text_encoder", pretrained_model_name_or_path="owner/model")
    serve(fake_hub("owner/model", other))
    with pytest.raises(CheckpointError, match=r"text_encoder/config.json of 'owner/model' names kernels"):
        load(repository)
    change(other / "text_encoder" / "config.json", _attn_implementation="eager")
    for place in (".", "text_encoder"):
        plant_adapter(place)(other)
        shutil.rmtree(repository.parent / "hub")
        with pytest.raises(CheckpointError, match="another model loaded in place"):
            load(repository)
        (other / place / "adapter_config.json").unlink()
    shutil.rmtree(repository.parent / "hub")
    assert load(repository).pipe.text_encoder.config._attn_implementation == "eager"


def test_another_repository_chooses_no_library(repository, serve):
    other = repository.parent / "other"
    other.mkdir()
    (repository / "vae").rename(other / "vae")
    (other / "model_index.json").write_text(json.dumps({"vae": ["uploaded", "X"]}))
    name_in_index(repository, "vae", pretrained_model_name_or_path="owner/model", type_hint=["diffusers", "AutoModel"])
    serve(fake_hub("owner/model", other))
    with pytest.raises(CheckpointError, match="names no class for its vae"):
        load(repository)
    assert not (repository.parent / "canary").exists()


def test_what_the_libraries_ask_of_the_hub_is_cancelled(repository, serve, monkeypatch):
    other = repository.parent / "other"
    (repository / "tokenizer").rename(other.joinpath("tokenizer") if not other.mkdir() else None)
    name_in_index(repository, "tokenizer", pretrained_model_name_or_path="owner/model")
    serve(fake_hub("owner/model", other))
    asks, ended = threading.Event(), threading.Event()

    def wait(*_, **__):
        asks.set()
        try:
            while True:
                time.sleep(0.01)
        finally:
            ended.set()

    def check(*_):
        if asks.is_set():
            raise Cancelled

    monkeypatch.setattr(ModularPipeline, "load_components", wait)
    with pytest.raises(Cancelled):
        load(repository, on_load=check)
    assert ended.wait(60)


def test_without_a_network_what_was_downloaded_is_loaded(repository, serve, monkeypatch):
    """The libraries themselves would try each file again, for minutes."""
    index = repository / "modular_model_index.json"
    index.write_text(index.read_text().replace(str(repository), "owner/model"))
    serve(fake_hub("owner/model", repository))
    recipe = Recipe("owner/model", blocks=REPOSITORY_BLOCKS, revision=COMMIT)
    allowed = AllowedCode(consents=frozenset({Consent.to(read_code("owner/model", COMMIT))}))
    materialise(recipe, allowed_code=allowed)
    release_materialised()
    serve(no_hub())
    load_components, asked = ModularPipeline.load_components, []

    def noted(*arguments, **options):
        asked.append(options["local_files_only"])
        return load_components(*arguments, **options)

    monkeypatch.setattr(ModularPipeline, "load_components", noted)
    pipe = materialise(recipe, allowed_code=allowed).pipe
    assert pipe.tokenizer is not None and asked == [dict.fromkeys(pipe.pretrained_component_names, True)]


def test_no_consent_no_class_of_it(repository):
    with pytest.raises(CodeNotAllowedError):
        materialise(Recipe(str(repository), blocks=REPOSITORY_BLOCKS))
