"""Files that are wrong on purpose: each is refused in one sentence that names it, soon, and in little memory."""

import io
import json
import os
import pickle
import re
import runpy
import threading
import zipfile
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from fuzz import Meter, read_input
from fuzz_headers import hollow_copy
from fuzz_inputs import MINI, ROOT
from fuzz_target import Target, names_its_file
from fuzz_targets import make_targets
from layouts import TRANSFORMER, UMT5, VAE

from streamblocks.checkpoints.checkpoint_error import CheckpointError, first_line, shown
from streamblocks.checkpoints.checkpoint_files import list_component_files
from streamblocks.checkpoints.checkpoint_reading import read_checkpoint
from streamblocks.checkpoints.json_text import parse_json, read_json
from streamblocks.checkpoints.layer_numbers import count_layers
from streamblocks.memory.cleanup import parse_state_rules
from streamblocks.stream.prompt_track import PromptTrack
from streamblocks.wan.checkpoints.components import text_encoder_component, transformer_component, vae_component
from streamblocks.wan.checkpoints.tokenizer import find_tokenizer

BF16 = torch.bfloat16


def refused(call, folder, message):
    """The error of `call`, which must be the pack's, within the limits of time and memory, and match `message`."""
    target = Target("test", 1, lambda random, folder: None, lambda folder: call(), names_its_file)
    outcome, said = read_input(target, Random(0), folder, Meter())
    assert (outcome, re.search(message, said) is not None) == ("", True), said


def safetensors(path, header, size=0):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + size)
    return path


def entry(*shape, dtype="U8", at=(0, 1)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(at)}


HEADERS = {
    "nested": (b'{"a":' + b"[" * 100_000, "nested more than 64 deep"),
    "nested and closed": (b'{"a":' + b"[" * 900 + b"]" * 900 + b"}", "nested more than 64 deep"),
    "many values": (b'{"a":[' + b"[]," * 700_000 + b"[]]}", "more values than any model's"),
    "many tensors": ({f"a{n}": 0 for n in range(20_001)}, "20001 tensors, and up to 20000"),
    "not utf-8": (b'{"\xff": 0}', "cannot be read as JSON"),
    "digits": (b'{"a":' + b"9" * 5000 + b"}", "cannot be read as JSON"),
    "twice": (b'{"a": 1, "a": 2}', "has 'a' twice"),
    "no object": (b"[1]", "holds no JSON object"),
    "surrogate": (b'{"\\ud800": 1}', "is no name of a tensor"),
    "control character": ({"a\x00b": entry(1)}, "is no name of a tensor"),
    "long name": ({"a" * 501: entry(1)}, "is no name of a tensor"),
    "no tensor": ({"a": [1]}, r"a is \[1\]"),
    "huge axis": ({"a": entry(10**30)}, "has the shape"),
    "huge axes": ({"a": entry(2**40, 2**40, 0, at=(0, 0))}, "has the shape"),
    "many axes": ({"a": entry(*[1] * 9)}, "has the shape"),
    "true for 1": ({"a": entry(True)}, "has the shape"),
    "overlap": ({"a": entry(1), "b": entry(1)}, "overlap or leave a gap at byte 0"),
    "gap": ({"a": entry(1, at=(1, 2))}, "overlap or leave a gap at byte 1"),
    "backwards": ({"a": entry(1, at=(1, 0))}, "has the data_offsets"),
    "unknown dtype": ({"a": entry(3, dtype="F4")}, r"1 bytes, which is not \[3\] of F4"),
    "dtype": ({"a": entry(1, dtype=["F32"])}, "has the dtype"),
    "metadata": ({"__metadata__": [], "a": entry(1)}, "__metadata__ is"),
}


@pytest.mark.parametrize("name", HEADERS)
def test_headers(name, tmp_path):
    header, message = HEADERS[name]
    path = safetensors(tmp_path / "x.safetensors", header, size=1)
    refused(lambda: read_checkpoint(path), tmp_path, message)


def test_the_length_of_a_header_is_not_believed(tmp_path):
    path = tmp_path / "x.safetensors"
    with path.open("wb") as file:
        file.write((2**33).to_bytes(8, "little") + b"{")
        file.truncate(2**34)
    refused(lambda: read_checkpoint(path), tmp_path, "its header has 8589934592 bytes, and up to")


def renumbered(source, path, old, new):
    """A hollow copy of `source` whose header says `new` for the first `old`."""
    hollow_copy(source, path)
    content = source.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = content[8 : 8 + length].replace(old.encode(), new.encode())
    return safetensors(path, header, size=len(content) - 8 - length)


@pytest.mark.parametrize("number", ["999999999", "9" * 300])
@pytest.mark.parametrize("kind", ["transformer", "text encoder"])
def test_layers_are_counted_and_not_their_numbers_believed(kind, number, tmp_path):
    if kind == "transformer":
        path = renumbered(TRANSFORMER, tmp_path / "x.safetensors", "blocks.2.", f"blocks.{number}.")
        refused(lambda: transformer_component(path, dtype=BF16), tmp_path, r"lacks the layer 2, blocks\.2")
    else:
        path = renumbered(UMT5, tmp_path / "x.safetensors", "block.1.", f"block.{number}.")
        refused(lambda: text_encoder_component(path, dtype=BF16), tmp_path, r"lacks the layer 1, encoder\.block\.1")


def test_layers_are_counted():
    assert count_layers(Path("x"), ["b.0.a", "b.1.a", "b.0.c", "c.7.a", "b.x.a", "ab.9.a"], "b.") == 2
    assert count_layers(Path("x"), [], "b.") == 0


def mini_folder(folder):
    for component in ("transformer", "vae", "text_encoder"):
        weights = next((MINI / component).glob("*.safetensors"))
        hollow_copy(weights, folder / component / weights.name)
        (folder / component / "config.json").write_bytes((MINI / component / "config.json").read_bytes())
    return folder


PARTS: dict[str, Any] = {
    "transformer": transformer_component,
    "vae": vae_component,
    "text_encoder": text_encoder_component,
}
CONFIGS = {
    "layers": ("transformer", {"num_layers": 10**9}, "num_layers 1000000000 in its config, allowed are whole numbers"),
    "more layers": ("transformer", {"num_layers": 7}, "num_layers 7 in its config and 6 layers in its weights"),
    "real layers": ("transformer", {"num_layers": 6.0}, "num_layers 6.0"),
    "true heads": ("transformer", {"num_attention_heads": True}, "num_attention_heads True"),
    "wide": ("transformer", {"num_attention_heads": 128, "attention_head_dim": 256}, "128 heads of 256 channels"),
    "rope": ("transformer", {"rope_max_seq_len": 10**9}, "rope_max_seq_len 1000000000"),
    "patch": ("transformer", {"patch_size": [0, 2, 2]}, "patch_size .* allowed are lists of 3 whole numbers"),
    "eps": ("transformer", {"eps": float("nan")}, "eps nan"),
    "class": ("transformer", {"_class_name": ["a"] * 10**5}, "and WanTransformer3DModel is needed"),
    "Wan's words": ("transformer", {"num_attention_heads": ..., "num_heads": 0}, "num_heads 0"),
    "statistics": ("vae", {"latents_mean": [0.0] * 7}, "7 latents_mean"),
    "no deviation": ("vae", {"latents_std": [0.0] * 8}, "latents_std"),
    "residual blocks": ("vae", {"num_res_blocks": 10**9}, "num_res_blocks 1000000000"),
    "steps": ("vae", {"temperal_downsample": [True]}, "1 temperal_downsample"),
    "widths": ("vae", {"dim_mult": "1244"}, "dim_mult '1244'"),
    "text layers": ("text_encoder", {"num_layers": 10**9}, "num_layers 1000000000"),
    "other text layers": ("text_encoder", {"num_layers": 3}, "num_layers 3 in its config and 2 layers in its weights"),
    "vocabulary": ("text_encoder", {"vocab_size": -1}, "vocab_size -1"),
    "activation": ("text_encoder", {"feed_forward_proj": "gated-nothing"}, "feed_forward_proj 'gated-nothing'"),
    "no number": ("text_encoder", {"classifier_dropout": None}, "classifier_dropout None in its config"),
    "type": ("text_encoder", {"model_type": {"a": 1}}, "and Wan needs umt5"),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_configs(name, tmp_path):
    part, changes, message = CONFIGS[name]
    path = mini_folder(tmp_path) / part / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not ...}))
    refused(lambda: PARTS[part](tmp_path, dtype=BF16), tmp_path, message)


def test_options_of_libraries_cannot_be_set_by_a_config(tmp_path):
    """Such as where transformers gets code for attention from."""
    path = mini_folder(tmp_path) / "text_encoder/config.json"
    options = {"_attn_implementation": "evil/kernels", "attn_implementation": "evil/kernels", "layer_norm_epsilon": 0}
    path.write_text(json.dumps(json.loads(path.read_text()) | options | {"auto_map": {"AutoModel": "evil.Evil"}}))
    component = text_encoder_component(tmp_path, dtype=BF16)
    assert "evil" not in json.dumps(component.config) and component.config["layer_norm_epsilon"] == 0.0


INDEXES = {
    "no string": ({"weight_map": {"a": None, "b": "x.safetensors"}}, "names None, but shards must be in its folder"),
    "outside": ({"weight_map": {"a": "../x.safetensors"}}, "shards must be in its folder"),
    "nothing there": ({"weight_map": {"a": "x.safetensors"}}, r"lacks the shard x\.safetensors"),
    "NUL": ({"weight_map": {"a": "x\x00.safetensors"}}, "shards must be in its folder"),
    "list": ({"weight_map": ["x.safetensors"]}, "has no weight_map"),
}


@pytest.mark.parametrize("name", INDEXES)
def test_indexes_of_shards(name, tmp_path):
    content, message = INDEXES[name]
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(content))
    refused(lambda: list_component_files(tmp_path), tmp_path, message)


MARKS = {
    "text": (b"x", "cannot be read as JSON"),
    "list": (b"[]", "holds no JSON object"),
    "format": (b'{"format": ["float8_e4m3fn"]}', r"stores blocks\.0\.self_attn\.q as \['float8_e4m3fn'\]"),
    "large": (b"{" + b" " * 2000 + b"}", "such a mark has up to 1024 bytes"),
}


@pytest.mark.parametrize("name", MARKS)
def test_quantization_marks(name, tmp_path):
    mark, message = MARKS[name]
    content = TRANSFORMER.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    end = len(content) - 8 - length
    prefix = next(key for key in header if key.endswith("blocks.0.self_attn.q.weight")).removesuffix("weight")
    header[f"{prefix}comfy_quant"] = entry(len(mark), at=(end, end + len(mark)))
    path = safetensors(tmp_path / "x.safetensors", header, end + len(mark))
    with path.open("r+b") as file:
        file.seek(-len(mark), os.SEEK_END)
        file.write(mark)
    refused(lambda: transformer_component(path, dtype=BF16), tmp_path, message)


OWN_FIELDS = {
    "no layers": ('{"config": {}}', "num_layers 40 in its config and 3 layers in its weights"),
    "no config": ("{}", "config and quantization are no objects"),
    "unknown format": (
        '{"config": {}, "quantization": {"format": []}}',
        "the header field streamblocks of .* cannot be",
    ),
    "no JSON": ("[" * 100, "nested more than 64 deep"),
}


@pytest.mark.parametrize("name", OWN_FIELDS)
def test_the_packs_own_header_field(name, tmp_path):
    text, message = OWN_FIELDS[name]
    content = TRANSFORMER.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length]) | {"__metadata__": {"streamblocks": text}}
    path = safetensors(tmp_path / "x.safetensors", header, len(content) - 8 - length)
    refused(lambda: transformer_component(path, dtype=BF16), tmp_path, message)


def zipped(content, *, others=(), compression=zipfile.ZIP_STORED):
    held = io.BytesIO()
    with zipfile.ZipFile(held, "w", compression) as archive:
        archive.writestr("a/data.pkl", content)
        archive.writestr("a/version", "3\n")
        for name in others:
            archive.writestr(name, b"")
    return held.getvalue()


def nested_dicts():
    """60 ** 16 entries in as many bytes as 16 dicts take."""
    inner: dict[str, Any] = {"a": 1}
    for _ in range(16):
        inner = {f"k{number}": inner for number in range(60)}
    return pickle.dumps(inner, 2)


BYTEARRAY = b"\x80\x02cbuiltins\nbytearray\nJ\xff\xff\xff\x7f\x85R."
CALLS = b"\x80\x02ccollections\nOrderedDict\nq\x00)q\x01" + b"h\x00h\x01R" * 60_001 + b"."
TORCH_FILES = {
    "bytearray": (zipped(BYTEARRAY), "asks for a bytearray"),
    "old bytearray": (BYTEARRAY, "asks for a bytearray"),
    "calls": (zipped(CALLS), "more entries than any checkpoint"),
    "the same dict again and again": (zipped(nested_dicts()), "more entries, or longer names, than any checkpoint"),
    "packed pickle": (zipped(b"\0" * 2**24, compression=zipfile.ZIP_DEFLATED), "is a compressed zip file"),
    "large pickle": (zipped(b"\0" * 8_000_001), "describes its tensors in 8000001 bytes"),
    "directory": (zipped(b".").replace(b"PK\x05\x06", b"PK\x05\x06"[:3] + b"\x06"), "is not a complete PyTorch file"),
    "entries": (zipped(b".")[:-12] + b"\xff" * 10 + b"\0\0", "entries in a directory of"),
    "unprintable global": (b"\x80\x02c\x03a\x04\nb\x05\nq\x00.", "asks for|not a PyTorch file"),
}


@pytest.mark.parametrize("name", TORCH_FILES)
def test_pytorch_files(name, tmp_path):
    content, message = TORCH_FILES[name]
    (tmp_path / "x.pt").write_bytes(content)
    refused(lambda: read_checkpoint(tmp_path / "x.pt"), tmp_path, message)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="has no pipes with names")
@pytest.mark.parametrize("kind", ["pipe", "device", "link to a pipe", "folder"])
def test_what_is_no_regular_file_is_refused_unopened(kind, tmp_path):
    def put(path):
        path.unlink(missing_ok=True)
        if kind == "device":
            path.symlink_to("/dev/zero")
        elif kind == "folder":
            path.mkdir()
        elif kind == "pipe":
            os.mkfifo(path)
        else:
            pipe = path.with_name(f"{path.name}.pipe")
            os.mkfifo(pipe)
            path.symlink_to(pipe)

    mini_folder(tmp_path)
    message = "is a folder and no file" if kind == "folder" else "is a device, a pipe or a socket"
    put(tmp_path / "x.safetensors")
    refused(lambda: read_checkpoint(tmp_path / "x.safetensors"), tmp_path, message)
    put(tmp_path / "x.pt")
    refused(lambda: read_checkpoint(tmp_path / "x.pt"), tmp_path, message)
    for part, component in PARTS.items():
        put(tmp_path / part / "config.json")
        refused(lambda component=component: component(tmp_path, dtype=BF16), tmp_path, message)
    (tmp_path / "tokenizer").mkdir()
    put(tmp_path / "tokenizer/tokenizer_config.json")
    refused(lambda: find_tokenizer([tmp_path]), tmp_path, message)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="has no pipes with names")
def test_a_pipe_in_a_hub_cache_does_not_stop_the_list_of_models(tmp_path):
    cache = tmp_path / "models--a--b"
    (cache / "snapshots/c0ffee/transformer").mkdir(parents=True)
    (cache / "refs").mkdir()
    os.mkfifo(cache / "refs/main")
    # Alone: the package around it asks for ComfyUI.
    find_pipeline_folders = runpy.run_path(str(ROOT / "host/pipeline_folders.py"))["find_pipeline_folders"]
    listing = threading.Thread(target=find_pipeline_folders, args=(tmp_path,), daemon=True)
    listing.start()
    listing.join(10)
    assert not listing.is_alive() and set(find_pipeline_folders(tmp_path)) == {"a/b"}


def test_tokenizers_that_their_library_panics_on_are_named(tmp_path):
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer/tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    (tmp_path / "tokenizer/tokenizer.json").write_text('{"version": "1.0", "model": {"type": "Unigram", "vocab": 3}}')
    refused(lambda: find_tokenizer([tmp_path]), tmp_path, "holds no tokenizer that transformers can load")


TRACKS = {
    # A pattern with several places for the same spaces took the fourth power of their number.
    "spaces": ("0" + " " * 3000 + "x: a", "line 1 of the track, '0 x: a', does not say when"),
    "surrogate": ("0: a :0.7 || b :0.\ud8003", r"has the weight 0\.\?3"),
    "long weight": ("0: a :0.7 || b :0." + "a" * 20_000, r"has the weight 0\.a+\.\.\."),
    "long strength": ("0 strength " + "9" * 20_000 + ": a", r"has the strength 9+\.\.\."),
    "control characters": ("0 \x1b[31m: a", r"'0 \?\[31m: a', does not say when"),
}


@pytest.mark.parametrize("name", TRACKS)
def test_tracks(name):
    text, message = TRACKS[name]
    with pytest.raises(ValueError, match=message) as raised:
        PromptTrack.parse(text)
    assert len(str(raised.value)) < 500 and str(raised.value).isprintable()


def test_state_rules_are_shown_shortened():
    with pytest.raises(ValueError, match="state_rules has 100001 letters"):
        parse_state_rules("a" * 100_001)
    with pytest.raises(ValueError, match="is not understood") as raised:
        parse_state_rules("a" * 100_000)
    assert len(str(raised.value)) < 200


@pytest.mark.parametrize("target", make_targets(), ids=lambda target: target.name)
def test_some_fuzzed_inputs(target, tmp_path):
    """`benchmarks/fuzz.py` is this with more of them, in processes of its own."""
    target.prepare(tmp_path)
    read_input(target, Random("first"), tmp_path, Meter())
    found = [read_input(target, Random(number), tmp_path, Meter()) for number in range(8)]
    assert [said for outcome, said in found if outcome] == []


def test_good_files_are_read_as_before(tmp_path):
    assert read_json(MINI / "transformer/config.json")["num_layers"] == 6
    assert parse_json(b'\xef\xbb\xbf{"a": [1, "\\"[[[[", -Infinity]}', "x") == {"a": [1, '"[[[[', float("-inf")]}
    assert parse_json(json.dumps({"a": "[" * 1000}).encode(), "x") == {"a": "[" * 1000}
    for part, component in PARTS.items():
        assert component(MINI, dtype=BF16).bytes == component(mini_folder(tmp_path), dtype=BF16).bytes, part
    assert vae_component(VAE, dtype=BF16).config["z_dim"] == 16


def test_values_are_shown_in_short():
    assert shown("a" * 1000).endswith("...'") or len(shown("a" * 1000)) <= 84
    assert shown(10**5000) == "a int" or len(shown(10**5000)) <= 84
    assert len(shown([["x" * 100] * 100] * 100)) <= 84 and shown("a\nb") == r"'a\nb'"
    assert first_line(CheckpointError("a\x00b\nc")) == "CheckpointError: a b"


@pytest.mark.parametrize(
    ("call", "found"),
    [
        (lambda folder: bytearray(2**27), "over_memory"),
        (lambda folder: sum(range(10**6)), "hangs"),
        (lambda folder: dict[str, int]()["a"], "unclear_errors"),
        (lambda folder: int("a"), "unclear_errors"),
        (lambda folder: folder, ""),
    ],
)
def test_the_benchmark_sees_what_should_not_be(call, found, tmp_path, monkeypatch):
    if found == "hangs":
        monkeypatch.setattr("fuzz.SECONDS", 0.005)
    target = Target("test", 1, lambda random, folder: None, call, names_its_file)
    Meter().give_back()
    assert read_input(target, Random(0), tmp_path, Meter())[0] == found
