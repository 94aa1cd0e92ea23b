"""The models of `run.sh`: names and paths, LoRAs in a prompt, and what it prints while it loads."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest

from streamblocks.tools.model_choices import (
    LORA_OPTION,
    MODEL_OPTIONS,
    SAMPLER,
    LoraWish,
    ModelOption,
    check_strengths,
    choose_models,
    insert_loras,
    parse_lora,
)
from streamblocks.tools.printed_progress import SILENCE_S, PrintedProgress

TWINS = Path(__file__).resolve().parent / "api_workflows"


class Folders:
    """A models folder with one more root, where nodes list all .safetensors files and all folders."""

    def __init__(self, base: Path) -> None:
        self.models, self.extra = base / "models", base / "extra"

    def model_roots(self, kind: str) -> list[Path]:
        return [self.models / kind, self.extra / kind]

    def listed(self, class_type: str, key: str) -> list[str]:
        option = next(o for o in (*MODEL_OPTIONS.values(), LORA_OPTION) if (o.class_type, o.key) == (class_type, key))
        return ["from elsewhere", *self._below(option.files, "*.safetensors"), *self._below(option.folders, "*")]

    def _below(self, kind: str | None, pattern: str) -> list[str]:
        roots = [] if kind is None else self.model_roots(kind)
        names = {path.relative_to(root).as_posix() for root in roots for path in root.rglob(pattern)}
        return [name if kind == "loras" else f"{kind}/{name}" for name in sorted(names)]


def make(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"")
    return path


@pytest.fixture
def folders(tmp_path: Path) -> Folders:
    made = Folders(tmp_path)
    make(made.models / "vae/wan/listed.safetensors")
    make(made.extra / "loras/listed.safetensors")
    return made


def choose(folders: Folders, option: ModelOption, text: object) -> str:
    return choose_models([(option, str(text))], folders)[0]


def links(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*") if path.is_symlink())


def test_names_are_taken_as_listed_and_paths_are_linked(folders, tmp_path):
    new = {name: make(tmp_path / f"new/{name}.safetensors") for name in ("transformer", "vae", "text", "lora")}
    (tmp_path / "new/pipeline").mkdir()
    wanted = {
        ("vae", "vae/wan/listed.safetensors"): "vae/wan/listed.safetensors",
        ("vae", "from elsewhere"): "from elsewhere",
        ("lora", "listed.safetensors"): "listed.safetensors",
        ("model", str(new["transformer"])): "diffusion_models/transformer.safetensors",
        ("model", str(tmp_path / "new/pipeline")): "diffusers/pipeline",
        ("components", str(tmp_path / "new/pipeline")): "diffusers/pipeline",
        ("vae", str(new["vae"])): "vae/vae.safetensors",
        ("text_encoder", str(new["text"])): "text_encoders/text.safetensors",
        ("lora", str(new["lora"])): "lora.safetensors",
    }
    options = {**MODEL_OPTIONS, "lora": LORA_OPTION}
    pairs = [(options[name], text) for name, text in wanted]
    assert choose_models(pairs, folders) == list(wanted.values())
    assert (folders.models / "vae/vae.safetensors").samefile(new["vae"])
    assert len(links(tmp_path)) == 5
    # A second run finds the links of the first.
    assert choose_models(pairs, folders) == list(wanted.values())
    assert len(links(tmp_path)) == 5


def test_a_path_in_the_models_folders_needs_no_link(folders, tmp_path, monkeypatch):
    inside = folders.models / "vae/wan/listed.safetensors"
    monkeypatch.chdir(folders.models / "vae/wan")
    for path in (inside, "listed.safetensors", "../wan/listed.safetensors"):
        assert choose(folders, MODEL_OPTIONS["vae"], path) == "vae/wan/listed.safetensors"
    assert choose(folders, LORA_OPTION, folders.extra / "loras/listed.safetensors") == "listed.safetensors"
    assert links(tmp_path) == []


def test_a_link_whose_file_has_moved_is_made_anew(folders, tmp_path):
    choose(folders, MODEL_OPTIONS["vae"], make(tmp_path / "here/new.safetensors"))
    (tmp_path / "here").rename(tmp_path / "there")
    moved = tmp_path / "there/new.safetensors"
    assert choose(folders, MODEL_OPTIONS["vae"], moved) == "vae/new.safetensors"
    assert (folders.models / "vae/new.safetensors").samefile(moved)


@pytest.mark.parametrize(
    ("name", "text", "sentence"),
    [
        (
            "vae",
            "vae/lsted.safetensors",
            r"--vae is .*, which is neither a name .* it lists vae/wan/listed\.safetensors\.",
        ),
        ("vae", "", r"--vae is '', which is neither a name that StreamBlocksLoadPipeline lists nor a path"),
        ("text_encoder", "x", r"there is no such model in the models folder, which --models names\."),
        (
            "lora",
            "gone.safetensors",
            r"--lora is 'gone\.safetensors', which is neither .* it lists listed\.safetensors\.",
        ),
        ("vae", "{base}/folder", r"--vae is '.*folder', a folder: give a file\."),
        (
            "components",
            "{base}/notes.txt",
            r"--components is '.*notes\.txt', a file: give a folder in diffusers' layout\.",
        ),
        (
            "model",
            "{base}/notes.txt",
            r"which StreamBlocksLoadPipeline does not list: give a \.safetensors or \.pt file or a",
        ),
        ("lora", "{base}/listed.safetensors", r"listed\.safetensors is another model of the same name: rename /"),
    ],
)
def test_what_is_not_there_is_one_sentence_and_leaves_no_link(folders, tmp_path, name, text, sentence):
    make(folders.models / "loras/listed.safetensors").write_text("another")
    (tmp_path / "folder").mkdir()
    fine = make(tmp_path / "fine.safetensors")
    make(tmp_path / "notes.txt"), make(tmp_path / "listed.safetensors")
    option = {**MODEL_OPTIONS, "lora": LORA_OPTION}[name]
    with pytest.raises(ValueError, match=sentence) as refused:
        choose_models([(MODEL_OPTIONS["vae"], str(fine)), (option, text.format(base=tmp_path))], folders)
    assert "\n" not in str(refused.value)
    assert links(tmp_path) == []


@pytest.mark.parametrize(
    ("text", "name", "strength"),
    [
        ("x.safetensors", "x.safetensors", 1.0),
        ("x.safetensors:0.5", "x.safetensors", 0.5),
        ("sub/x:-1", "sub/x", -1.0),
        ("x:.5", "x", 0.5),
        ("x:2e-1", "x", 0.2),
        ("a:b", "a:b", 1.0),
        ("a:b:0.25", "a:b", 0.25),
        ("x:", "x:", 1.0),
        ("x:nan", "x:nan", 1.0),
        (r"C:\loras\x.safetensors", r"C:\loras\x.safetensors", 1.0),
        (r"C:\loras\x.safetensors:0.8", r"C:\loras\x.safetensors", 0.8),
    ],
)
def test_a_strength_is_what_follows_the_last_colon_if_it_is_a_number(text, name, strength):
    assert parse_lora(text) == LoraWish(name, strength)


def test_a_strength_out_of_range_is_refused():
    check_strengths([LoraWish("x", -20.0), LoraWish("x", 20.0)], {"min": -20.0, "max": 20.0})
    with pytest.raises(ValueError, match=r"--lora x has strength 21: give one from -20 to 20\."):
        check_strengths([LoraWish("x", 21.0)], {"min": -20.0, "max": 20.0})


@pytest.mark.parametrize("workflow", ["text_to_video_stream", "quantized_stream"])
def test_loras_come_between_what_feeds_the_sampler_and_the_sampler(workflow):
    prompt = json.loads((TWINS / f"{workflow}.json").read_text())
    plain = copy.deepcopy(prompt)
    insert_loras(prompt, [])
    assert prompt == plain
    insert_loras(prompt, [LoraWish("one.safetensors"), LoraWish("sub/two.safetensors", 0.5)])
    sampler = next(node_id for node_id, node in plain.items() if node["class_type"] == SAMPLER)
    source = plain[sampler]["inputs"]["pipeline"]
    first, second = [node_id for node_id in prompt if node_id not in plain]
    inputs = {node_id: prompt[node_id]["inputs"] for node_id in prompt}
    assert [prompt[node_id]["class_type"] for node_id in (first, second)] == ["StreamBlocksLora"] * 2
    assert inputs[first] == {"pipeline": source, "lora": "one.safetensors", "strength": 1.0}
    assert inputs[second] == {"pipeline": [first, 0], "lora": "sub/two.safetensors", "strength": 0.5}
    assert inputs.pop(sampler) == plain[sampler]["inputs"] | {"pipeline": [second, 0]}
    assert {node_id: prompt[node_id] for node_id in inputs if node_id in plain} == {
        node_id: node for node_id, node in plain.items() if node_id != sampler
    }


def test_samplers_of_one_pipeline_share_the_loras():
    sampler = {"class_type": SAMPLER, "inputs": {"pipeline": ["load", 0]}}
    prompt = {
        "load": {"class_type": "StreamBlocksLoadPipeline", "inputs": {}},
        "3:1": sampler,
        "7": copy.deepcopy(sampler),
    }
    insert_loras(prompt, [LoraWish("one")])
    assert prompt["3:1"]["inputs"] == prompt["7"]["inputs"] == {"pipeline": ["8", 0]}
    assert set(prompt) == {"load", "3:1", "7", "8"}
    with pytest.raises(ValueError, match="has no StreamBlocksSampler, so --lora cannot be used"):
        insert_loras({"load": prompt["load"]}, [LoraWish("one")])


def test_loading_prints_its_end_and_what_breaks_a_silence(monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    progress = PrintedProgress()
    for component in ("transformer", "vae"):
        for percent in range(0, 101, 5):
            progress.say("Sampler", f"loading {component}: {percent} % of 0.51 GB")
        progress.say("Sampler", "block 1 of 2 is being made")
    progress.say("Sampler", "block 1 of 2: 3 pictures a second")
    now[0] += SILENCE_S + 1
    for percent in (5, 10):
        progress.say("Sampler", f"loading transformer: {percent} % of 28.00 GB")
    progress.step("Sampler", 1, 4)
    assert [line.partition("] ")[2] for line in capsys.readouterr().out.splitlines()] == [
        "Sampler: loading transformer: 100 % of 0.51 GB",
        "Sampler: block 1 of 2 is being made",
        "Sampler: loading vae: 100 % of 0.51 GB",
        "Sampler: block 1 of 2: 3 pictures a second",
        "Sampler: loading transformer: 5 % of 28.00 GB",
    ]
