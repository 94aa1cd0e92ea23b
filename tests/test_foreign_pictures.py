"""Pictures of foreign pipelines in the forms that there are: converted as PIL would, or named in one sentence."""

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image
from test_sinks import decode

from streamblocks.memory.json_text import json_text
from streamblocks.stream.choices import StreamChoices
from streamblocks.stream.frames import to_uint8_frames
from streamblocks.stream.picture_rate import exact_rate
from streamblocks.stream.sinks import Mp4Sink
from streamblocks.stream.snapshot_tree import TreeReader, TreeWriter

RGB = torch.randint(0, 256, (5, 6, 8, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
RGBA = torch.cat([RGB, torch.full((5, 6, 8, 1), 77, dtype=torch.uint8)], dim=-1)
GREY = RGB[..., :1]


def images(pictures, mode):
    return [Image.fromarray(picture.numpy().squeeze()).convert(mode) for picture in pictures]


@pytest.mark.parametrize("floats", [False, True])
@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 3, 1, 2), (3, 0, 1, 2)], ids=["last", "second", "first"])
@pytest.mark.parametrize("pictures", [RGB, RGBA, GREY], ids=["rgb", "rgba", "grey"])
def test_channels_are_found_wherever_they_are(pictures, order, floats):
    given = pictures.permute(order)
    given = given / 255 if floats else given
    expected = pictures[..., :3].expand(5, 6, 8, 3)
    for video in (given, given.numpy(), list(given) if order[0] == 0 else given):
        assert torch.equal(to_uint8_frames([video]), expected)
    # Without the axis of the batch.
    assert torch.equal(to_uint8_frames(given), expected)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "P", "1"])
def test_images_of_every_mode_are_what_pil_makes_of_them(mode):
    made = images(RGB, mode)
    expected = torch.stack([torch.from_numpy(np.array(image.convert("RGB"))) for image in made])
    assert torch.equal(to_uint8_frames([made]), expected)


def test_halves_doubles_and_overshoot_are_taken():
    pictures = RGB / 255
    for kind in (torch.float16, torch.float64):
        assert (to_uint8_frames([pictures.to(kind)]).int() - RGB.int()).abs().max() <= 1
    assert torch.equal(to_uint8_frames([pictures.numpy()[:, ::-1]]), RGB.flip(1))
    beyond = torch.where(RGB.max() == RGB, 1.1, pictures)
    assert to_uint8_frames([beyond]).max() == 255


@pytest.mark.parametrize(
    ("videos", "sentence"),
    [
        (None, "videos is NoneType: "),
        (5, "videos is int: "),
        ("abc", "videos is str: "),
        ([], "videos holds no video: "),
        ([None], "videos holds no video: "),
        ([[]], r"videos\[0\] holds no pictures: "),
        ([["a"]], r"videos\[0\] is a list of str: "),
        ([RGB[:0]], r"shape \[0, 6, 8, 3\], which is no picture: "),
        ([RGB[0]], r"shape \[6, 8, 3\]: four axes"),
        ([torch.zeros(2, 5, 6, 7)], r"shape \[2, 5, 6, 7\], without 1, 3 or 4 channels: "),
        ([RGB / 127.5 - 1], r"has values from -1 to 1: "),
        ([RGB.float()], r"has values from 0 to 255: "),
        ([RGB.int()], r"is of torch.int32: "),
        ([RGB.numpy().astype(complex)], r"is an array of complex128: "),
        ([[RGB[0], RGB[0, :4]]], r"has pictures of shapes \[\(4, 8, 3\), \(6, 8, 3\)\]: "),
        ([[Image.new("I", (8, 6))]], r"has PIL images of mode I: "),
        ([RGB / 0.0], "holds NaN or infinite values"),
    ],
)
def test_what_is_no_video_is_named_in_one_sentence(videos, sentence):
    with pytest.raises(ValueError, match=sentence) as raised:
        to_uint8_frames(videos)
    assert "\n" not in str(raised.value)


def test_odd_sides_lose_a_line_in_the_file_and_other_sizes_are_named(tmp_path):
    pictures = torch.full((3, 33, 49, 3), 90, dtype=torch.uint8)
    sink = Mp4Sink(tmp_path / "a.mp4")
    sink.write(pictures)
    with pytest.raises(ValueError, match="the pictures are 64x32 and those before were 48x32: "):
        sink.write(pictures.new_zeros(1, 32, 64, 3))
    sink.close()
    assert decode(tmp_path / "a.mp4").shape == (3, 32, 48, 3)
    with pytest.raises(ValueError, match="the pictures are 1x33: an mp4 has at least 2x2"):
        Mp4Sink(tmp_path / "b.mp4").write(pictures[:, :, :1])


@pytest.mark.parametrize("fps", [-1.0, math.nan, math.inf, -math.inf, 1e-9, 1e9])
def test_rates_that_no_file_has_are_named(tmp_path, fps):
    sentence = r"^fps is \S+: give 0\.01 to 1000 pictures a second"
    for make in (exact_rate, lambda rate: StreamChoices(fps=rate).check(16)):
        with pytest.raises(ValueError, match=sentence):
            make(fps)
    for rate in (fps, 0.0):
        with pytest.raises(ValueError, match=sentence):
            Mp4Sink(tmp_path / "a.mp4", fps=rate)


def test_json_has_no_nan():
    figures = {"a": math.nan, "b": [1.5, -math.inf, (math.inf, "NaN")], math.nan: {"c": 2}}
    assert json.loads(json_text(figures), parse_constant=pytest.fail) == {
        "a": None,
        "b": [1.5, None, [None, "NaN"]],
        "nan": {"c": 2},
    }
    # A stream's state is not changed for it.
    text = TreeWriter(torch.device("cpu")).write({"loss": -math.inf, "x": (math.nan, 1.0)})
    json.loads(text, parse_constant=pytest.fail)
    read = TreeReader({}, torch.device("cpu"), {}).read(text)
    assert read["loss"] == -math.inf and math.isnan(read["x"][0]) and read["x"][1] == 1.0
