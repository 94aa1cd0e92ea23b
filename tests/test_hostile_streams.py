"""What `benchmarks/fuzz.py` found in saved streams, videos, pictures, foreign configs and texts: one sentence each."""

import io
import json
import math
import os
import struct
from fractions import Fraction
from random import Random
from types import SimpleNamespace
from typing import Any

import fuzz_foreign
import pytest
import torch
from fuzz import Meter, read_input
from fuzz_inputs import LAYOUTS
from fuzz_pictures import Videos
from fuzz_saved import saved_stream, seal
from fuzz_target import Target, is_sentence, names_its_file
from fuzz_texts import TRACKS
from PIL import Image

from streamblocks.families.step_list import StepList
from streamblocks.ops.quantization import QuantizationSpec
from streamblocks.stream.fit_pictures import PictureFit
from streamblocks.stream.foreign_bounds import check_config_bounds
from streamblocks.stream.foreign_loading import load_foreign_pipeline
from streamblocks.stream.growing_mp4 import check_fragments
from streamblocks.stream.joined_mp4 import check_earlier
from streamblocks.stream.jpeg_pictures import decode_jpeg
from streamblocks.stream.mp4_boxes import Mp4BoxesError, check_boxes
from streamblocks.stream.opened_video import UnreadableVideoError, open_video, video_track
from streamblocks.stream.picture_sources import PictureBatch, VideoFile
from streamblocks.stream.prompt_track import MOST_LETTERS, PromptTrack
from streamblocks.stream.recipe import REPOSITORY_BLOCKS, Recipe
from streamblocks.stream.run_point import SnapshotFileError
from streamblocks.stream.saved_folder import SavedFolder
from streamblocks.stream.saved_names import names_of_saved
from streamblocks.stream.saved_stream import describe_saved, read_saved
from streamblocks.stream.snapshot_file import read_snapshot_file
from streamblocks.stream.snapshot_tree import TreeReader
from streamblocks.stream.video_input import VideoInput, VideoReader
from streamblocks.wan.checkpoints.tokenizer import TOKENIZER_KEY, find_tokenizer
from streamblocks.wan.family import CAUSAL_WAN_21

CPU = torch.device("cpu")
STREAM = saved_stream()


@pytest.fixture(scope="module")
def videos():
    return Videos()


def within(call, folder, error, message, megabytes=64):
    """The error of `call`: one sentence, of this kind, within a second and so much memory."""
    said = []

    def is_clear(raised, _):
        said.append((raised, str(raised)))
        return isinstance(raised, error) and message in str(raised) and is_sentence(str(raised))

    target = Target("test", 1, lambda random, folder: None, lambda folder: call(), is_clear)
    outcome, _ = read_input(target, Random(0), folder, Meter())
    assert outcome == "" and said, said


def described(**changes):
    return json.dumps(json.loads(describe_saved(STREAM)) | changes)


def layout_of(**changes):
    return json.dumps(json.loads(STREAM.snapshot.layout) | changes)


DESCRIPTIONS = {
    "nested": ("[" * 100_000, "description is no JSON"),
    "many values": ('{"a":[' + "[]," * 700_000 + "[]]}", "more values than any"),
    "named twice": ('{"version":1,"version":1}', "twice"),
    "unprintable": (described(point={"\x1b[31m\n": 1}), "cannot be read"),
    "nested layout": (described(layout='{"a":' * 100_000), "nested more than 64 deep"),
    "no position": (described(layout=layout_of(stream_position=[6])), "stream_position [6]"),
    "a list of steps": (described(settings=json.loads(describe_saved(STREAM))["settings"] | {"timesteps": "a" * 10**6}),
                        "timesteps has 1000000 letters"),
}  # fmt: skip


@pytest.mark.parametrize("name", DESCRIPTIONS)
def test_descriptions_of_saved_streams(name, tmp_path):
    text, message = DESCRIPTIONS[name]
    path = tmp_path / "block_0000001.safetensors"
    within(lambda: read_saved(path, text, STREAM.snapshot.tensors), tmp_path, SnapshotFileError, message)


@pytest.mark.parametrize(("name", "shape"), [("a", [2**62, 2**62, 0]), ("b\n" * 1000, [2**64, 0])])
def test_a_tensor_of_nothing_is_bounded(name, shape, tmp_path):
    before = b'{"__metadata__":{"sha256":"' + b"0" * 64 + b'","streamblocks":"{}"},'
    entry = json.dumps({name: {"dtype": "F32", "shape": shape, "data_offsets": [0, 0]}})
    path = tmp_path / "block_0000001.safetensors"
    path.write_bytes(seal(before + entry[1:].encode(), b""))
    within(lambda: read_snapshot_file(path), tmp_path, SnapshotFileError, "the sizes of ")


def parts_of(kind):
    nodes = [json.loads(STREAM.snapshot.layout)]
    while nodes:
        node = nodes.pop()
        if isinstance(node, dict) and node.get("kind") == kind:
            return node
        nodes += list(node.values() if isinstance(node, dict) else node if isinstance(node, list) else ())
    raise LookupError(kind)


@pytest.mark.parametrize("kind", ["KVCache", "PackedKVCache"])
@pytest.mark.parametrize("capacity", [10**12, -1, 2.5, "a\nb", None])
def test_caches_of_snapshots_are_bounded(kind, capacity, tmp_path):
    node = parts_of(kind)
    pairs = [[name, capacity if name == "capacity" else part] for name, part in node["parts"]["dict"]]
    layout = json.dumps({"cache": {"kind": kind, "parts": {"dict": pairs}}})
    reader = TreeReader(STREAM.snapshot.tensors, CPU, CAUSAL_WAN_21.snapshot_kinds())
    within(lambda: reader.read(layout), tmp_path, ValueError, f"go_on_from holds a {kind} of other parts")


def test_names_of_saved_streams(tmp_path):
    good = tmp_path / "good"
    good.mkdir()
    (good / "block_0000001.safetensors").write_bytes(b"")
    (good / "block_0000002.safetensors").symlink_to("nowhere")
    (good / "block_\u0663\u0663\u0663\u0663\u0663\u0663\u0663.safetensors").write_bytes(b"")
    for name in ("a\nb", "\u202eb"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "block_0000001.safetensors").write_bytes(b"")
    assert names_of_saved(tmp_path) == ["good"]
    assert [path.name for path in SavedFolder(good).snapshots()] == [
        "block_0000002.safetensors",
        "block_0000001.safetensors",
    ]


def test_a_saved_track_in_seconds_has_no_place():
    with pytest.raises(ValueError, match="the track has times in seconds"):
        PromptTrack.parse(TRACKS[1]).place(None, None)


GROWING = {
    "zeros": (b"", 10**6),
    "a box of 3 bytes": (struct.pack(">I4s", 1, b"moof") + struct.pack(">Q", 3), 2),
    "more boxes": (struct.pack(">I4s", 8, b"moof") * 9, 2),
}


@pytest.mark.parametrize("name", GROWING)
def test_the_boxes_of_a_growing_video_are_counted(name, tmp_path):
    head, blocks = GROWING[name]
    path = tmp_path / "video.mp4"
    path.write_bytes(head)
    with path.open("r+b") as file:
        file.truncate(2**34)
    within(lambda: check_fragments(path, blocks, 2**34), tmp_path, OSError, "is another one")


def box(kind, *parts):
    content = b"".join(parts)
    return struct.pack(">I4s", 8 + len(content), kind) + content


def mp4_with(*tables):
    track = box(b"trak", box(b"mdia", box(b"minf", box(b"stbl", *tables))))
    return box(b"ftyp", b"isom\0\0\0\0") + box(b"moov", track) + box(b"mdat", b"")


def table(kind, *numbers):
    return box(kind, b"\0\0\0\0", struct.pack(f">{len(numbers)}I", *numbers))


BOXES = {
    "equal sizes": (mp4_with(table(b"stsz", 1, 2**31)), "stsz says 2147483648 pictures of one size"),
    "sizes": (mp4_with(table(b"stsz", 0, 2**31)), "stsz says 2147483648 pictures"),
    "times": (mp4_with(table(b"stts", 2**29)), "stts says 536870912 entries"),
    "one time for all": (mp4_with(table(b"ctts", 1, 2**31, 0), table(b"stsz", 0, 0)), "ctts has 2147483648 pictures"),
    "places": (mp4_with(table(b"co64", 2**28)), "co64 says"),
    "titles": (
        box(b"moov", box(b"udta", box(b"meta", b"\0\0\0\0", table(b"hdlr", 0), table(b"keys", 2**27)))),
        "keys says 134217728 entries",
    ),
    "a run": (box(b"moof", box(b"traf", box(b"trun", struct.pack(">II", 0x200, 2**30)))), "trun says"),
    "a run of no fragment": (
        box(b"moof", box(b"mfhd", b"\0" * 8)) + box(b"trun", struct.pack(">III", 0x278, 2**25, 0)),
        "trun says 33554432 pictures",
    ),
    "runs of nothing": (
        box(b"moof", box(b"traf", box(b"trun", struct.pack(">II", 0, 600_000)))) * 2,
        "1200000 pictures nothing but",
    ),
    "called sound": (
        mp4_with(table(b"stsz", 1, 2**31), table(b"hdlr", 0, int.from_bytes(b"soun", "big")), table(b"stts", 1, 9, 2)),
        "stsz says 2147483648 pictures of one size",
    ),
    "a large list of brands": (box(b"ftyp", b"\0" * 32_000_001), "has 32000001 bytes"),
    "a large index": (box(b"ftyp", b"") + box(b"moov", b"\0" * 32_000_001), "its index has 32000001 bytes"),
}


@pytest.mark.parametrize("name", BOXES)
def test_tables_of_videos_are_no_larger_than_their_files(name):
    content, message = BOXES[name]
    with pytest.raises(Mp4BoxesError, match=message):
        check_boxes(io.BytesIO(content))


def test_nothing_behind_a_video_is_not_read_to_its_end(videos, tmp_path):
    path = tmp_path / "video.mp4"
    path.write_bytes(videos.finished[0])
    # No room on the disk is taken.
    os.truncate(path, 17 * 2**30)
    within(lambda: check_earlier(path, 4), tmp_path, OSError, "bytes of nothing follow its boxes")


def test_boxes_of_good_videos_are_left_alone(videos):
    # An hour of sound that is not compressed, as cameras write it, and bytes of nothing behind the video.
    seconds = table(b"stsz", 4, 3600 * 48_000), table(b"stts", 1, 3600 * 48_000, 1)
    hour = mp4_with(*seconds, table(b"hdlr", 0, int.from_bytes(b"soun", "big")))
    check_boxes(io.BytesIO(hour + b"a note of a phone"))
    for content in (videos.growing, *videos.finished):
        check_boxes(io.BytesIO(content))
        # What is broken off in its pictures is read as far as it goes.
        for kept in (videos.growing[:-1], content.partition(b"mdat")[0] + b"mdat"):
            check_boxes(io.BytesIO(kept))
    for other in (b"", b"\x1aE\xdf\xa3" * 4, b"RIFF\0\0\0\0AVI "):
        check_boxes(io.BytesIO(other))


def test_a_title_in_another_encoding_is_no_damage(videos, tmp_path):
    path = tmp_path / "video.mp4"
    assert b"Lavf" in videos.finished[0]
    path.write_bytes(videos.finished[0].replace(b"Lavf", b"L\xff\x80f"))
    check_earlier(path, 4)
    assert VideoFile("video", str(path)).facts().width == 32


OTHER_FORMATS = {
    "lyrics": b"[00:01.00]a\n[00:02.00]b\n",
    "subtitles": b"WEBVTT\n\n00:00.000 --> 00:01.000\na\n",
    "playlist": b"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n%s\n#EXT-X-ENDLIST\n",
    "list of files": b"ffconcat version 1.0\nfile '%s'\n",
}


@pytest.mark.parametrize("name", OTHER_FORMATS)
def test_texts_and_lists_are_no_videos(name, videos, tmp_path):
    """FFmpeg would read a text to its end, and open the files and addresses that a list names."""
    other = tmp_path / "other.mp4"
    other.write_bytes(videos.finished[0])
    path = tmp_path / "video.mp4"
    path.write_bytes(OTHER_FORMATS[name].replace(b"%s", str(other).encode()))
    with path.open("r+b") as file:
        file.truncate(2**32)
    within(lambda: VideoFile("video", str(path)).facts(), tmp_path, ValueError, "video 'video.mp4' cannot be read")


def test_pictures_that_nothing_can_decode_are_said(videos, tmp_path):
    path = tmp_path / "video.mp4"
    path.write_bytes(videos.finished[0].replace(b"avc1", b"\0\0\0\0"))
    within(lambda: check_earlier(path, 4), tmp_path, OSError, "no pictures in it that FFmpeg can decode")
    within(lambda: VideoFile("video", str(path)).facts(), tmp_path, ValueError, "no pictures in it that FFmpeg can")
    with open_video(path) as container, pytest.raises(UnreadableVideoError):
        video_track(container)


@pytest.mark.parametrize("end", ["loop", "hold", "stop"])
@pytest.mark.parametrize("taken", [0, 2, 3, 4, 7, 11])
def test_pictures_that_were_taken_are_skipped_as_if_they_were_read(end, taken):
    images = torch.arange(3.0).view(3, 1, 1, 1).expand(3, 16, 16, 3) / 3

    def reader():
        return VideoReader(
            VideoInput(PictureBatch("video", images), Fraction(16), 0.5, at_end=end), PictureFit(16, 16, "crop")
        )

    skipped, read = reader(), reader()
    skipped.skip(taken)
    for _ in range(taken):
        read.next(1)
    ours, theirs = skipped.next(5), read.next(5)
    assert (ours is None and theirs is None) or torch.equal(ours, theirs)
    assert skipped.use().rounds == read.use().rounds
    endless = reader()
    # More than could be read in a life.
    endless.skip(3 * 2**58 + taken)
    if end == "loop":
        assert torch.equal(endless.next(5), ours)


@pytest.mark.parametrize("mode", ["RGB", "CMYK"])
def test_large_jpegs_take_little_memory(mode, tmp_path):
    held = io.BytesIO()
    Image.new(mode, (2500, 2500)).save(held, "JPEG")
    (tmp_path / "a").write_bytes(held.getvalue())
    read = SimpleNamespace(picture=None)

    def call(folder):
        read.picture = decode_jpeg((folder / "a").read_bytes())

    target = Target("test", 1, lambda random, folder: None, call, names_its_file)
    assert read_input(target, Random(0), tmp_path, Meter()) == ("", "")
    assert read.picture.shape == (1250, 1250, 3)
    held = io.BytesIO()
    Image.new(mode, (3000, 2000)).save(held, "JPEG", progressive=True)
    within(lambda: decode_jpeg(held.getvalue()), tmp_path, ValueError, "The picture is 3000x2000 in several scans")


def test_a_tokenizer_that_encodes_nothing_is_named(tmp_path):
    content = (LAYOUTS / "comfy_umt5.safetensors").read_bytes()
    length = int.from_bytes(content[:8], "little")
    begin, end = json.loads(content[8 : 8 + length])[TOKENIZER_KEY]["data_offsets"]
    model = content[8 + length + begin : 8 + length + end].replace(b"</s>", b"<\0s>")
    text = json.dumps({TOKENIZER_KEY: {"dtype": "U8", "shape": [len(model)], "data_offsets": [0, len(model)]}}).encode()
    path = tmp_path / "umt5.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + model)
    within(lambda: find_tokenizer([path]), tmp_path, ValueError, f"{path} holds a tokenizer")


CONFIGS = {
    "layers": ("transformer/config.json", {"num_layers": 10**9}, "has 'num_layers' 1000000000"),
    "rows of positions": ("transformer/config.json", {"rope_max_seq_len": 10**8}, "has 'rope_max_seq_len'"),
    "blocks in a list": ("vae/config.json", {"layers_per_block": [1, [10**9]]}, "has 'layers_per_block'"),
    "timesteps": ("scheduler/scheduler_config.json", {"num_train_timesteps": 10**9}, "has 'num_train_timesteps'"),
    "width": ("transformer/config.json", {"ffn_dim": 10**9}, "has 'ffn_dim' 1000000000, and up to 16777216"),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_configs_of_foreign_components_are_bounded(name, tmp_path):
    place, changes, message = CONFIGS[name]
    for path, config in fuzz_foreign._configs(tmp_path).items():
        (tmp_path / path).parent.mkdir(exist_ok=True)
        if path != "modular_config.json":
            (tmp_path / path).write_text(json.dumps(config | (changes if path == place else {})))
    recipe = Recipe(str(tmp_path), blocks=REPOSITORY_BLOCKS)
    within(
        lambda: load_foreign_pipeline(recipe, dtype=torch.bfloat16, vae_dtype=torch.bfloat16),
        tmp_path,
        ValueError,
        message,
    )
    # diffusers leaves the dtype that it loads in where a model cannot be built of its config.
    assert torch.get_default_dtype() == torch.float32


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"\u202e": [3, "AutoencoderKLWan"]}, r"[3, 'AutoencoderKLWan'] as the class of its '\u202e'"),
        ({"scheduler": ["a", "b", {"type_hint": "\n"}]}, "names '\\n' as the class of its scheduler"),
        ({"a\nb" * 900: [1, 2]}, "as the class of its 'a\\nb"),
    ],
)
def test_names_in_foreign_indexes_are_shown_in_short(changes, message, tmp_path):
    index = fuzz_foreign._configs(tmp_path)["modular_model_index.json"]
    (tmp_path / "modular_model_index.json").write_text(json.dumps(index | changes))
    recipe = Recipe(str(tmp_path), blocks=REPOSITORY_BLOCKS)
    dtypes: dict[str, Any] = {"dtype": torch.bfloat16, "vae_dtype": torch.bfloat16}
    within(lambda: load_foreign_pipeline(recipe, **dtypes), tmp_path, ValueError, message)


def test_null_is_no_value_of_a_name_that_settings_do_not_have(tmp_path):
    preset = CAUSAL_WAN_21.presets[0]
    for name in ("namex", "name", "source"):
        within(
            lambda name=name: preset.changed({name: None}, "a.json"), tmp_path, ValueError, f"a.json has {name} = None"
        )


def test_configs_of_real_models_are_within_bounds():
    """Of published pipelines: numbers whose names have such words in them, as their configs say them."""
    for config in (
        {
            "block_out_channels": [320, 640, 1280, 1280],
            "layers_per_block": 2,
            "sample_size": 128,
            "norm_num_groups": 32,
        },
        {"vocab_size": 256_384, "num_layers": 24, "d_ff": 10_240, "relative_attention_max_distance": 128},
        {"num_hidden_layers": 126, "max_position_embeddings": 10_485_760, "rope_theta": 500_000.0, "eos_token_id": [1]},
        {"sampling_rate": 48_000, "sample_rate": 44_100, "num_train_timesteps": 1000, "pos_embed_max_size": 192},
        {
            "joint_attention_dim": 4096,
            "axes_dims_rope": [16, 56, 56],
            "num_single_layers": 38,
            "rope_max_seq_len": 1024,
        },
        {"n_routed_experts": 256, "time_step_limit": [0.0, math.inf], "rope_theta": 1e9, "block_size": 65_536},
    ):
        check_config_bounds("config.json", config)


TEXTS = {
    "long track": (lambda: PromptTrack.parse("0: a\n" * (MOST_LETTERS // 5 + 1)), "the track has 24000"),
    "many mixed": (lambda: PromptTrack.parse("0: " + "a||" * 20_001), "20001 times '||'"),
    "many words": (lambda: PromptTrack.parse("0" + " cut" * 240_000 + ": a"), "does not say when"),
    "long prompt": (lambda: PromptTrack().then("a" * (MOST_LETTERS + 1)), "prompt has 2400001 letters"),
    "interpolation": (lambda: PromptTrack.parse("0: a", "x" * 10_000), "interpolation is 'xxx"),
    "steps": (lambda: StepList.parse("timesteps", "a" * 9_000), "timesteps is 'aaa"),
    "many steps": (lambda: StepList.parse("timesteps", "1 " * 6_000), "timesteps has 12000 letters"),
    "skip": (lambda: QuantizationSpec("fp8", skip=("*" * 10_001,)), "skip has 10001 letters"),
    "model": (lambda: Recipe("x" * 10_000), "model is 'xxx"),
}


@pytest.mark.parametrize("name", TEXTS)
def test_texts_of_workflows_are_bounded(name, tmp_path):
    call, message = TEXTS[name]
    within(call, tmp_path, ValueError, message)
